"""An objective as a run trains on it: one loss or several, each with its weight, its options and what it needs."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sartor.data.trees import TokenTree
from sartor.losses.weighting import wpo_weights
from sartor.objectives.contract import Inputs, Loss, Traits, call, evaluate, moderate
from sartor.objectives.logps import TreeLogps


@dataclass(frozen=True)
class Term:
    """One loss of the mixture, its options bound; ``given`` are those that the user set, as written."""

    name: str
    loss: Loss
    weight: float
    traits: Traits
    beta: float | None
    given: str = ""

    def __str__(self) -> str:
        weight = "" if self.weight == 1 else f"{self.weight:g}·"
        return f"{weight}{self.name}" + (f" ({self.given})" if self.given else "")

    @property
    def reads_ties(self) -> bool:
        """Whether tied pairs have something to say to it."""
        return self.traits.reads_ties

    def units(self, tree: TokenTree) -> int:
        """What one tree holds for it to take its mean over: pairs, verdicts, or one ranking."""
        match self.traits.kind:
            case "pairs":
                return len(tree.pairs) + self.reads_ties * len(tree.ties)
            case "completions":
                return sum(verdict is not None for verdict in tree.verdicts)
        return int(bool(tree.pairs) or (self.reads_ties and bool(tree.ranks)))

    def inputs(self, logps: TreeLogps, ld_alpha: float | None = None) -> Inputs:
        """What it sees of the trees."""
        match self.traits.kind:
            case "pairs":
                return logps.pairs(self.reads_ties, ld_alpha)
            case "completions":
                return logps.judged()
        return logps.ranked(self.reads_ties)


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses, each averaged over its own units of the whole optimizer batch.

    ``wpo`` weighs each pair by how likely the policy itself would write it; ``ld_alpha`` weighs the tokens that one
    side of a pair has beyond the other's length. Both act on pairwise losses only.
    """

    terms: tuple[Term, ...]
    wpo: bool = False
    ld_alpha: float | None = None

    def __str__(self) -> str:
        more = [" weighted by WPO"] * self.wpo + [f" with LD α {self.ld_alpha}"] * (self.ld_alpha is not None)
        return " + ".join(map(str, self.terms)) + "".join(more)

    @cached_property
    def depends_on(self) -> frozenset[str]:
        """Fields that some term depends on."""
        return frozenset[str]().union(*(term.traits.depends_on for term in self.terms))

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probs have to be known; KL to it can only be had with them."""
        return any(term.traits.needs_reference for term in self.terms) or self.needs_kl

    @property
    def needs_kl(self) -> bool:
        """Whether both models' next-token distributions have to be compared at every token."""
        return bool(self.depends_on & {"chosen_kl", "rejected_kl"})

    @property
    def needs_mismatched(self) -> bool:
        """Whether a baseline is wanted from completions under prompts that they do not answer."""
        return "mismatched_policy" in self.depends_on

    @property
    def reads_ties(self) -> bool:
        """Whether tied pairs are of use."""
        return any(term.reads_ties for term in self.terms)

    @property
    def mixes(self) -> bool:
        """Whether one entry's loss depends on the others: then it must see the whole optimizer batch at once."""
        return any(term.traits.whole_batch for term in self.terms)

    @property
    def beta(self) -> float:
        """β of the first term that has one: what implicit rewards are measured in."""
        return next((term.beta for term in self.terms if term.beta is not None), 1.0)

    def digest(self) -> str:
        """Hash of what it does on a batch of usual numbers: another loss under the same name is another objective."""
        found = hashlib.blake2b(repr((self.wpo, self.ld_alpha)).encode(), digest_size=16)
        for term in self.terms:
            losses, gradients = evaluate(term.name, term.loss, moderate(term.traits.kind, 12))
            numbers = [f"{x:.4g}" for values in (losses, *gradients.values()) for x in values.flatten().tolist()]
            found.update(repr((term.name, term.weight, numbers)).encode())
        return found.hexdigest()

    def units(self, trees: Sequence[TokenTree]) -> list[int]:
        """What each term takes its mean over, in these trees."""
        return [sum(term.units(tree) for tree in trees) for term in self.terms]

    def losses(self, logps: TreeLogps) -> list[tuple[float, Tensor, list[int]]]:
        """For each term its weight, its losses by unit, and the tree that each unit belongs to."""
        found = []
        for term in self.terms:
            owners = [i for i, tree in enumerate(logps.trees) for _ in range(term.units(tree))]
            losses = logps.policy.new_zeros(0)
            if owners:
                losses = call(term.name, term.loss, term.inputs(logps, self.ld_alpha))
            if owners and self.wpo:
                losses = wpo_weights(*logps.pair_certainty(term.reads_ties)) * losses
            found.append((term.weight, losses, owners))
        return found

    def total(self, logps: TreeLogps, units: Sequence[int]) -> Tensor:
        """The share of these trees in the loss of a batch with so many ``units`` per term; a scalar, differentiable."""
        parts = zip(self.losses(logps), units, strict=True)
        shares = [weight / max(1, count) * losses.sum() for (weight, losses, _), count in parts]
        return torch.stack(shares).sum()
