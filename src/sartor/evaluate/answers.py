"""What the model says: sampled answers before and after, how far it moved, who wins, and how alike they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from sartor.data.trees import TokenIds, TokenTree, split_by_budget
from sartor.evaluate.diversity import distinct_n
from sartor.evaluate.statistics import Estimate, mean, proportion
from sartor.model.load import LanguageModel
from sartor.model.reference import score_trees
from sartor.rewards.scoring import Scorer, as_rows, from_rows, score_texts
from sartor.rollout.local import Sampling, sample
from sartor.types import Text


@dataclass(frozen=True)
class Answers:
    """n sampled answers to each prompt, their lengths in tokens, and their scores where there is a scorer."""

    prompts: list[Text]
    texts: list[list[str]]
    lengths: list[list[int]]
    scores: list[list[float]] | None = None

    def rows(self) -> list[dict[str, Any]]:
        """As they stand in ``samples_before.jsonl``."""
        scores: Sequence[list[float] | None] = self.scores or [None] * len(self.prompts)
        return [
            {"prompt": as_rows(prompt), "texts": texts, "lengths": lengths, "scores": score}
            for prompt, texts, lengths, score in zip(self.prompts, self.texts, self.lengths, scores, strict=True)
        ]

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]]) -> "Answers":
        """What :meth:`rows` wrote."""
        scores = [row["scores"] for row in rows]
        return cls(
            [from_rows(row["prompt"]) for row in rows],
            [row["texts"] for row in rows],
            [row["lengths"] for row in rows],
            None if None in scores else scores,
        )


def answer(
    model: LanguageModel,
    prompts: Sequence[Text],
    ids: Sequence[TokenIds],
    n: int,
    sampling: Sampling,
    scorer: Scorer | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Sample ``n`` answers to each prompt, and score them."""
    samples = sample(model, ids, n, sampling, progress)
    texts = [[one.text.strip() for one in row] for row in samples]
    answers = Answers(list(prompts), texts, [[len(one.tokens) for one in row] for row in samples])
    if scorer is None:
        return answers
    flat = iter(score_texts(scorer, [p for p in prompts for _ in range(n)], [text for row in texts for text in row]))
    return replace(answers, scores=[[next(flat) for _ in row] for row in texts])


@torch.no_grad()
def kl_to_reference(
    policy: LanguageModel,
    reference: LanguageModel,
    prompts: Sequence[TokenIds],
    sampling: Sampling,
    token_budget: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Estimate:
    """KL(policy ‖ reference) in nats per completion, over completions of at most ``sampling.max_new_tokens``.

    One completion y per prompt is drawn from the policy itself (temperature 1, all words) and log π(y|x) minus
    log π_ref(y|x) averaged: unbiased, though a single run of few prompts can come out below 0. ``reference`` may be
    the policy itself, with an adapter to switch off.
    """
    drawn = sample(policy, prompts, 1, replace(sampling, temperature=1.0, top_p=1.0), progress)
    trees = [TokenTree(prompt, (row[0].tokens,)) for prompt, row in zip(prompts, drawn, strict=True)]
    ratios = []
    for group in split_by_budget([tree.size for tree in trees], token_budget):
        batch = [trees[i] for i in group]
        ours, theirs = score_trees(policy, batch), score_trees(reference, batch, adapter=False)
        ratios += [float((a - b).sum()) for a, b in zip(ours, theirs, strict=True)]
    return mean(ratios)


def compare(before: Answers, after: Answers) -> dict[str, Estimate | int | None]:
    """Before against after on the same prompts. The prompt is the unit of every interval."""
    scored = before.scores is not None and after.scores is not None
    return {
        "score_before": _by_prompt(before.scores) if scored else None,
        "score_after": _by_prompt(after.scores) if scored else None,
        "win_rate": win_rate(before.scores or [], after.scores or []) if scored else None,
        "distinct_2_before": mean([distinct_n(texts) for texts in before.texts]),
        "distinct_2_after": mean([distinct_n(texts) for texts in after.texts]),
        "length_before": _by_prompt(before.lengths),
        "length_after": _by_prompt(after.lengths),
        "prompts": len(after.prompts),
        "samples": max(map(len, after.texts), default=0),
    }


def win_rate(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Estimate:
    """Chance that a fresh answer of ``after`` scores higher than one of ``before`` to the same prompt, ties half.

    All pairs of one prompt's answers meet; prompts are the independent units of the interval.

    >>> win_rate([[0.0, 1.0], [0.0, 0.0]], [[1.0, 2.0], [1.0, 1.0]]).value
    0.9375
    """
    wins, prompt = [], []
    for i, (row_before, row_after) in enumerate(zip(before, after, strict=True)):
        meetings = [(a > b) + 0.5 * (a == b) for b, a in product(row_before, row_after)]
        wins += meetings
        prompt += [i] * len(meetings)
    return proportion(wins, prompt)


def _by_prompt(rows: Sequence[Sequence[float]] | None) -> Estimate:
    rows = rows or []
    return mean([value for row in rows for value in row], [i for i, row in enumerate(rows) for _ in row])
