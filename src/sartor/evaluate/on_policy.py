"""Answers that a policy drew itself: what they earn, how far it went for them, and what that left of its variety."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sartor.data.trees import TokenIds, TokenTree, split_by_budget
from sartor.evaluate.answers import Answers
from sartor.evaluate.diversity import distinct_n, self_bleu
from sartor.evaluate.statistics import Estimate, mean
from sartor.model.load import LanguageModel
from sartor.model.reference import score_trees
from sartor.rollout.local import Sample

Table = list[list[float]]  # a row for each prompt, an entry for each answer


@dataclass(frozen=True)
class OnPolicy:
    """``kl`` is log π(y|x) - log π_ref(y|x) and ``surprise`` -log π(y|x), both in nats per answer.

    With answers drawn at temperature 1 from all words their means are unbiased for KL(π ‖ π_ref) (k1) and for the
    entropy of the policy.
    """

    answers: Answers
    kl: Table
    surprise: Table
    scores: Mapping[str, Table]

    def estimates(self) -> dict[str, Estimate]:
        """Means with prompts as the units of their intervals, under the names of TRL's PPO where it has one."""
        lengths = self.answers.lengths
        found = {f"objective/{name}": _mean(table) for name, table in self.scores.items()}
        found["objective/kl"] = _mean(self.kl)
        found["completions/length"] = _mean(lengths)
        found["completions/entropy"] = mean([sum(s) / sum(n) for s, n in zip(self.surprise, lengths, strict=True)])
        found["completions/distinct_2"] = mean([distinct_n(row) for row in self.answers.texts])
        if all(len(row) > 1 for row in lengths):
            found["completions/self_bleu"] = mean([self_bleu(row) for row in self.answers.texts])
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A row for each prompt, with everything that was measured of its answers."""
        tables = {"kl": self.kl, "surprise": self.surprise, **self.scores}
        return [
            {**row, **{name: table[i] for name, table in tables.items()}} for i, row in enumerate(self.answers.rows())
        ]


@torch.no_grad()
def look_at(
    policy: LanguageModel,
    reference: LanguageModel,
    prompts: Sequence[TokenIds],
    drawn: Sequence[Sequence[Sample]],
    token_budget: int,
) -> tuple[Table, Table]:
    """``kl`` and ``surprise`` of :class:`OnPolicy`. The policy itself stands for the weights under its adapter."""
    trees = [TokenTree(ids, tuple(one.tokens for one in row)) for ids, row in zip(prompts, drawn, strict=True)]
    kl: Table = [[] for _ in trees]
    surprise: Table = [[] for _ in trees]
    for group in split_by_budget([tree.size for tree in trees], token_budget):
        batch = [trees[i] for i in group]
        ours, theirs = score_trees(policy, batch), score_trees(reference, batch, adapter=reference is not policy)
        for i, own, other in zip(group, ours, theirs, strict=True):
            surprise[i] = [-float(part.sum()) for part in own.split(trees[i].counts)]
            kl[i] = [float(part.sum()) for part in (own - other).split(trees[i].counts)]
    return kl, surprise


def _mean(table: Sequence[Sequence[float]]) -> Estimate:
    return mean([value for row in table for value in row], [i for i, row in enumerate(table) for _ in row])
