"""Answers to prompts that a run never trains on: what they earn, how far from the start, how alike they are."""

from collections.abc import Mapping
from typing import Any

import torch

from sartor.config import SamplingConfig
from sartor.console import show_table
from sartor.data.chat import last_turn
from sartor.evaluate.answers import Answers, compare
from sartor.evaluate.on_policy import OnPolicy, look_at
from sartor.evaluate.statistics import Estimate
from sartor.train.rollout import Stage, WeightedReward, draw, score_all
from sartor.train.run import RunFolder
from sartor.train.summary import percent, side_by_side

SHOWN = 3  # answers to show while a run goes on


class HeldOutAnswers:
    """``eval_samples`` answers to each held-out prompt, drawn at temperature 1 by the same random numbers."""

    def __init__(self, config: SamplingConfig, run: RunFolder, stage: Stage) -> None:
        self.config, self.run, self.stage = config, run, stage
        self.answers: Answers | None = None  # of the latest evaluation

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, Estimate]:
        """Scores, KL and variety; what was measured is kept answer by answer in ``answers-STEP.jsonl``."""
        config, prompts, stage = self.config, self.stage.held_out, self.stage
        drawn = draw(stage.actors.policy, prompts, config.eval_samples, config.max_new_tokens, [config.seed, 7])
        kl, surprise = look_at(stage.actors.policy, stage.actors.reference, prompts.ids, drawn, config.token_budget)
        texts = [[one.text.strip() for one in row] for row in drawn]
        scores = {"scores": score_all(stage.reward, prompts, texts).tolist()}
        if stage.truth:
            scores["true_scores"] = score_all(WeightedReward([(1.0, stage.truth)]), prompts, texts).tolist()
        # Before and after are told by the truth where it is known.
        judged = scores.get("true_scores", scores["scores"])
        self.answers = Answers(prompts.texts, texts, [[len(one.tokens) for one in row] for row in drawn], judged)
        found = OnPolicy(self.answers, kl, surprise, scores)
        self.run.write_jsonl(f"answers-{step}.jsonl", found.rows())
        shown = zip(prompts.texts[:SHOWN], texts, judged, strict=False)
        show_table(
            ["score", "prompt", "answer"],
            [(f"{s[0]:.2f}", _short(last_turn(p)), t[0]) for p, t, s in shown],
        )
        return found.estimates()

    def in_words(self, measured: Mapping[str, Estimate]) -> str:
        """Reward, truth where it is known, and KL."""
        truth = f", true score {measured['objective/true_scores']}" if self.stage.truth else ""
        return f"reward {measured['objective/scores']}{truth}, KL {measured['objective/kl']} nats"

    def summary(self, estimates: Mapping[str, Estimate], title: str) -> dict[str, Any]:
        """The comparison with the start, as a run's summary has it; writes the answers side by side."""
        config, stage = self.config, self.stage
        assert self.answers is not None  # the last evaluation has just been
        told_by = "true_scores" if stage.truth else "scores"
        rows = self.run.read_jsonl("answers-0.jsonl")
        before = Answers.from_rows([{**row, "scores": row[told_by]} for row in rows])
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
                "eval": f"{len(stage.held_out.texts)} prompts that this run held out",
                "notes": stage.notes,
            },
        }


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def rewarded_headline(comparison: Mapping[str, Any], by: str) -> str:
    """The result in one sentence, and no more than the interval allows to say."""
    share, kl = comparison["win_rate"], comparison["kl"]
    what = (
        f"by {by}, its answers to {share.n} held-out prompts score better than the original model's in "
        f"{percent(share)} of comparisons, {kl} nats away from it."
    )
    return f"No difference shown: {what}" if share.low <= 0.5 <= share.high else what[0].upper() + what[1:]
