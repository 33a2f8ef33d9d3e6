"""What all candidates of a run share: one frozen base, one tokenised data set, one cache of reference log-probs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from sartor.data.trees import TokenTree
from sartor.discover.rungs.many import Batch
from sartor.discover.rungs.outcome import Pairs, Scored
from sartor.model.load import LanguageModel
from sartor.train.loop import Plan, Schedule
from sartor.train.preferences import Preferences


@dataclass(frozen=True)
class Recipe:
    """How every candidate is trained; β and learning rate are its own to choose."""

    steps: int
    batch_size: int
    warmup_ratio: float
    schedule: str
    max_grad_norm: float
    token_budget: int

    def rates(self, peak: float) -> Schedule:
        """The learning rate by step."""
        return Schedule(peak, self.steps, round(self.warmup_ratio * self.steps), self.schedule)

    def plan(self, items: int, seed: int) -> Plan:
        """Which trees make up each step."""
        return Plan(items, self.batch_size, self.steps, seed)


def best_and_worst(ranks: Sequence[float]) -> tuple[int, int]:
    """Where the two ends of a ranking stand: most of what it says, at a fraction of its tokens.

    >>> best_and_worst([2.0, 3.0, 1.0])
    (2, 1)
    """
    return ranks.index(min(ranks)), ranks.index(max(ranks))


@dataclass(frozen=True)
class Part:
    """Preferences to train on, or to judge by, with the reference's log-probs summed by branch.

    Branches are numbered in the order of ``data.trees``, tree after tree; ``scores`` are their true scores, if known.
    With ``extremes`` only the best and the worst of each tree are compared.
    """

    data: Preferences
    scores: Sequence[float] | None = None
    extremes: bool = False

    @property
    def scored(self) -> Scored | None:
        """The branches with their true scores, where those are known."""
        if self.scores is None:
            return None
        numbers = {tree: n for n, tree in enumerate(dict.fromkeys(self.data.prompt_numbers))}
        prompts = [
            numbers[self.data.prompt_numbers[i]] for i, tree in enumerate(self.data.trees) for _ in tree.branches
        ]
        return Scored(torch.tensor(self.scores), torch.tensor(prompts))

    @cached_property
    def first(self) -> list[int]:
        """The number of each tree's first branch, and of all branches at the end."""
        return list(accumulate((len(tree.branches) for tree in self.data.trees), initial=0))

    @cached_property
    def reference(self) -> Float[Tensor, " branches"]:
        """log π_ref of each branch."""
        return torch.stack(
            [
                part.sum()
                for tree, logps in zip(self.data.trees, self.data.reference, strict=True)
                for part in logps.split(tree.counts)
            ]
        )

    @cached_property
    def length(self) -> Float[Tensor, " branches"]:
        """Tokens of each branch."""
        return torch.tensor([float(count) for tree in self.data.trees for count in tree.counts])

    def pairs(self, items: Sequence[int] | None = None) -> Pairs:
        """The pairs of some trees, or of all; prompts are numbered from 0 in the order in which they come."""
        items = range(len(self.data.trees)) if items is None else items
        numbers: dict[int, int] = {}
        rows = [
            (self.first[i] + a, self.first[i] + b, numbers.setdefault(self.data.prompt_numbers[i], len(numbers)))
            for i in items
            for a, b in self._pairs(self.data.trees[i])
        ]
        return Pairs(*torch.tensor(rows, dtype=torch.long).view(-1, 3).unbind(1))

    def _pairs(self, tree: TokenTree) -> Sequence[tuple[int, int]]:
        return [best_and_worst(tree.ranks)] if self.extremes else tree.pairs

    @cached_property
    def compared(self) -> "Part":
        """The branches that are in pairs, alone: all that is needed to compare."""
        if not self.extremes:
            return self
        kept = [sorted(*self._pairs(tree)) for tree in self.data.trees]
        trees = [
            replace(tree, branches=tuple(tree.branches[n] for n in at), ranks=tuple(tree.ranks[n] for n in at))
            for tree, at in zip(self.data.trees, kept, strict=True)
        ]
        reference = [
            torch.cat([logps.split(tree.counts)[n] for n in at])
            for tree, logps, at in zip(self.data.trees, self.data.reference, kept, strict=True)
        ]
        return Part(replace(self.data, trees=trees, reference=reference))

    def batches(self, recipe: Recipe, seed: int) -> list[Batch]:
        """What each optimizer step sees, in the order of a real run with this seed."""
        plan = recipe.plan(len(self.data.trees), seed)
        return [self._batch(plan.batch(step)) for step in range(plan.steps)]

    def _batch(self, items: Sequence[int]) -> Batch:
        branches = torch.tensor([n for i in items for n in range(self.first[i], self.first[i + 1])])
        place = torch.full((self.first[-1],), -1)
        place[branches] = torch.arange(len(branches))
        pairs = self.pairs(items)
        here = Pairs(place[pairs.better], place[pairs.worse], pairs.prompt)
        return Batch(branches, here, self.reference[branches], self.length[branches])


@dataclass(frozen=True)
class Truth:
    """What a policy is really for, where that can be computed: the true score of the answers it draws.

    ``price`` is what a nat of KL costs in units of the score; ``answers`` of up to ``max_new_tokens`` tokens are drawn
    to each prompt. ``on_policy`` where the held-out branches are answers that the reference drew.
    """

    scorer: str
    price: float
    on_policy: bool
    answers: int
    max_new_tokens: int


@dataclass(frozen=True)
class Material:
    """A model with an adapter, what to train on and what to judge by."""

    model: LanguageModel
    train: Part
    held_out: Part
    recipe: Recipe
    truth: Truth | None = None
