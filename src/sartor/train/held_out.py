"""Answers to prompts that a run never trains on: what they earn, how far from the start, how alike they are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sartor.config import SamplingConfig
from sartor.console import show_table
from sartor.data.trees import TokenTree, pack, split_by_budget
from sartor.evaluate.answers import Answers, compare
from sartor.evaluate.diversity import distinct_n
from sartor.evaluate.statistics import Estimate, mean
from sartor.model.forward import token_logps
from sartor.rollout.local import Sample
from sartor.train.rollout import Stage, WeightedReward, draw, score_all
from sartor.train.run import RunFolder
from sartor.train.stopwatch import Stopwatch
from sartor.train.summary import percent, side_by_side
from sartor.types import Text

SHOWN = 3  # answers to show while a run goes on


class HeldOutAnswers:
    """``eval_samples`` answers to each held-out prompt, drawn at temperature 1 by the same random numbers."""

    def __init__(self, config: SamplingConfig, run: RunFolder, watch: Stopwatch, stage: Stage) -> None:
        self.config, self.run, self.watch, self.stage = config, run, watch, stage
        self.answers: Answers | None = None  # of the latest evaluation

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, Estimate]:
        """Scores, KL and variety; prompts are the units of the intervals. What step 0 says is kept for the end."""
        config, prompts, stage = self.config, self.stage.held_out, self.stage
        with self.watch.stage("sample"):
            drawn = draw(stage.actors.policy, prompts, config.eval_samples, config.max_new_tokens, [config.seed, 7])
        texts = [[one.text.strip() for one in row] for row in drawn]
        lengths = [[len(one.tokens) for one in row] for row in drawn]
        units = [i for i, row in enumerate(texts) for _ in row]
        scores = score_all(stage.reward, prompts, texts)
        found = {"objective/scores": mean(scores.flatten().tolist(), units), "objective/kl": self._kl(drawn)}
        if stage.truth:
            scores = score_all(WeightedReward([(1.0, stage.truth)]), prompts, texts)
            found["objective/true_scores"] = mean(scores.flatten().tolist(), units)
        found["completions/length"] = mean([float(n) for row in lengths for n in row], units)
        found["completions/distinct_2"] = mean([distinct_n(row) for row in texts])
        self.answers = Answers(prompts.texts, texts, lengths, scores.tolist())
        shown = zip(prompts.texts[:SHOWN], texts, scores.tolist(), strict=False)
        show_table(["score", "prompt", "answer"], [(f"{s[0]:.2f}", last_words(p), t[0]) for p, t, s in shown])
        if step == 0:
            self.run.write_jsonl("samples_before.jsonl", self.answers.rows())
        return found

    def _kl(self, drawn: Sequence[Sequence[Sample]]) -> Estimate:
        """KL(π ‖ π_ref) in nats per completion, by k1 on the samples themselves."""
        actors, prompts = self.stage.actors, self.stage.held_out
        trees = [TokenTree(ids, tuple(one.tokens for one in row)) for ids, row in zip(prompts.ids, drawn, strict=True)]
        found: list[list[float]] = [[] for _ in trees]
        for group in split_by_budget([tree.size for tree in trees], self.config.token_budget):
            batch = pack([trees[i] for i in group]).to(actors.policy.device)
            ratios = token_logps(actors.policy, batch) - token_logps(actors.reference, batch)
            for i, part in zip(group, ratios.split([sum(tree.counts) for tree in batch.trees]), strict=True):
                found[i] = [float(one.sum()) for one in part.split(trees[i].counts)]
        return mean([value for row in found for value in row], [i for i, row in enumerate(found) for _ in row])

    def in_words(self, measured: Mapping[str, Estimate]) -> str:
        """Reward, truth where it is known, and KL."""
        truth = f", true score {measured['objective/true_scores']}" if self.stage.truth else ""
        return f"reward {measured['objective/scores']}{truth}, KL {measured['objective/kl']} nats"

    def summary(self, estimates: Mapping[str, Estimate], title: str) -> dict[str, Any]:
        """The comparison with the start, as a run's summary has it; writes the answers side by side."""
        config, stage = self.config, self.stage
        assert self.answers is not None  # the last evaluation has just been
        before = Answers.from_rows(self.run.read_jsonl("samples_before.jsonl"))
        self.run.write_jsonl("samples.jsonl", side_by_side(before, self.answers))
        comparison = {**compare(before, self.answers), "kl": estimates["objective/kl"]}
        by = f"the true score {config.score}" if config.score else stage.named
        return {
            "title": title,
            "headline": rewarded_headline(comparison, by),
            "scorer": config.score or stage.named,
            "comparison": comparison,
            "data": {
                "train": f"{len(stage.training.texts)} prompts of {config.data}",
                "eval": f"{len(stage.held_out.texts)} prompts never trained on",
                "notes": stage.notes,
            },
        }


def last_words(prompt: Text) -> str:
    """What a prompt asks, short enough for a table."""
    asked = prompt if isinstance(prompt, str) else prompt[-1].content
    return asked if len(asked) <= 40 else asked[:37] + "..."


def rewarded_headline(comparison: Mapping[str, Any], by: str) -> str:
    """The result in one sentence, and no more than the interval allows to say."""
    share, kl = comparison["win_rate"], comparison["kl"]
    what = (
        f"by {by}, its answers to {share.n} prompts never trained on score better than the original model's in "
        f"{percent(share)} of comparisons, {kl.value:.2g} nats [{kl.low:.2g}, {kl.high:.2g}] away from it."
    )
    return f"No difference shown: {what}" if share.low <= 0.5 <= share.high else what[0].upper() + what[1:]
