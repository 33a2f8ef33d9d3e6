"""The shape of an objective: its loss and the weights it gives both sides, over the margin, and what follows from them.

For any objective over pairs the parameters' gradient is a weighted sum of two gradients per pair, those of the two
log-probs: a loss is no more than its two fields of weights, ∂L/∂log π_w and ∂L/∂log π_l. Pointwise and listwise losses
are drawn for one good and one bad completion, and for a list of two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sartor.objectives.contract import Inputs, evaluate
from sartor.objectives.objective import Term
from sartor.types import JudgedLogps, PairLogps, RankedLogps

Curve = NDArray[np.float64]
LENGTH = 20  # tokens of either side where the length is not the question
REFERENCE = -40.0  # nats
FAR = 4000.0  # nats: where a loss that is bounded has stopped growing
FLAT = 1e-3  # of the loss's own range: growth that counts as none
MARGINS, SHIFTS, LENGTHS = np.linspace(-10, 30, 41), (-8.0, 0.0, 8.0), (float(LENGTH), 2.0 * LENGTH)  # of fingerprints


@dataclass(frozen=True)
class Shape:
    """A loss over the margin ρ, the chosen side's log-ratio ρ/2 and the rejected one's -ρ/2.

    ``chosen`` and ``rejected`` are -∂L/∂log π_w and ∂L/∂log π_l: how hard training pulls the chosen side up and the
    rejected one down.
    """

    margin: Curve
    loss: Curve
    chosen: Curve
    rejected: Curve

    @property
    def slope(self) -> float:
        """dL/dρ at ρ = 0: negative where training starts by raising the margin."""
        at = int(np.abs(self.margin).argmin())
        return float(-(self.chosen[at] + self.rejected[at]) / 2)

    @property
    def convex(self) -> bool:
        """Whether the slope never falls on the way from left to right."""
        slope = -(self.chosen + self.rejected) / 2
        return bool((np.diff(slope) > -1e-4 * np.abs(slope).max()).all())

    @property
    def rises(self) -> list[tuple[float, float]]:
        """Intervals of the margin in which the loss rises with it, so that training lowers it."""
        slope = -(self.chosen + self.rejected) / 2
        wrong = np.concatenate([[False], slope > 1e-4 * np.abs(slope).max(), [False]])
        edges = np.flatnonzero(wrong[1:] != wrong[:-1])
        return [(float(self.margin[a]), float(self.margin[b - 1])) for a, b in edges.reshape(-1, 2)]


def shape(term: Term, reach: float = 40.0, points: int = 101) -> Shape:
    """Draw a loss over margins from -``reach`` to ``reach`` nats.

    Of a loss with batch statistics every point stands in a batch with 31 others of usual margins, and the curve is what
    the batch's loss gains or loses by it.
    """
    if not term.traits.whole_batch:
        return _shape(term, np.linspace(-reach, reach, 8 * (points - 1) + 1))
    margin = np.linspace(-reach, reach, points)
    others = np.random.default_rng(0).normal(2.0, 6.0, 31)
    drawn = [_shape(term, np.append(others, m), last=True) for m in margin]
    columns = [np.concatenate([getattr(d, name) for d in drawn]) for name in ("margin", "loss", "chosen", "rejected")]
    return Shape(*columns)


def is_bounded(term: Term) -> bool:
    """Whether the loss stops growing at both ends."""
    at = np.array([-FAR, -FAR / 2, 0.0, FAR / 2, FAR])
    loss = np.array([_shape(term, at[i : i + 1]).loss[0] for i in range(len(at))])
    span = np.ptp(loss) or 1.0
    return bool(abs(loss[0] - loss[1]) < FLAT * span and abs(loss[-1] - loss[-2]) < FLAT * span)


def fingerprint(term: Term) -> Curve:
    """The two fields of weights on a grid of margins, common shifts and lengths, as a vector of length 1.

    What the reference says, the strengths and the KL vary along the grid, so that no loss is taken for another that
    does not look at them. Two losses with the same vector train alike but for the learning rate.
    """
    inputs = grid(term.traits.kind)
    chosen, rejected = _weights(term, evaluate(term.name, term.loss, inputs)[1])
    vector = np.concatenate([chosen, rejected])
    return vector / (np.linalg.norm(vector) or 1.0)


@cache
def grid(kind: str) -> Inputs:
    """The entries that a fingerprint is taken at, for objectives that see this kind of input."""
    margin, shift, length = (axis.ravel() for axis in np.meshgrid(MARGINS, SHIFTS, LENGTHS, indexing="ij"))
    return _inputs(kind, margin, shift, length, varied=True)


@dataclass(frozen=True)
class Candidate:
    """A loss to compare with, at one β."""

    term: Term
    fingerprint: Curve


@dataclass(frozen=True)
class Likeness:
    """The loss that trains most alike, at the β where it does; ``cosine`` 1 is the same up to scale."""

    name: str
    beta: float | None
    cosine: float

    def __str__(self) -> str:
        at = "" if self.beta is None else f" at β {self.beta:.2g}"
        return f"{self.name}{at}, {self.cosine:.3f}"


def nearest(term: Term, others: Sequence[Candidate]) -> Likeness:
    """Of the ``others`` that see pairs or what this loss sees, the one whose fingerprint points most nearly its way."""
    mine = fingerprint(term)
    found = [
        Likeness(other.term.name, other.term.beta, float(other.fingerprint @ mine))
        for other in others
        if other.term.name != term.name and other.term.traits.kind in ("pairs", term.traits.kind)
    ]
    # Where several are the same, as listwise losses are for two answers, the plain one is named.
    return max(found, key=lambda likeness: (round(likeness.cosine, 4), likeness.name == "dpo", likeness.cosine))


def _shape(term: Term, margin: Curve, last: bool = False) -> Shape:
    """The curve over ``margin``; ``last``: of its last point alone, as part of the batch that the others make up."""
    losses, gradients = evaluate(term.name, term.loss, _inputs(term.traits.kind, margin, np.zeros_like(margin), LENGTH))
    chosen, rejected = _weights(term, gradients)
    loss = losses.double().numpy()
    if term.traits.kind == "completions":
        loss = loss[: len(margin)] + loss[len(margin) :]
    if not last:
        return Shape(margin, loss, chosen, rejected)
    return Shape(margin[-1:], loss.sum(keepdims=True), chosen[-1:], rejected[-1:])


def _inputs(kind: str, margin: Curve, shift: Curve, chosen_length: Curve | int, varied: bool = False) -> Inputs:
    n = len(margin)
    noise = torch.from_numpy(np.random.default_rng(0).normal(0.0, 5.0, (4, n))).float() * varied
    references = REFERENCE + noise[0], REFERENCE + noise[1]
    policies = (
        references[0] + torch.from_numpy(shift + margin / 2).float(),
        references[1] + torch.from_numpy(shift - margin / 2).float(),
    )
    lengths = torch.as_tensor(chosen_length).expand(n).long(), torch.full((n,), LENGTH)
    match kind:
        case "pairs":
            kl = {"chosen_kl": 1 + noise[2].abs(), "rejected_kl": 1 + noise[3].abs()}
            strength = noise[2].abs() if varied else torch.full((n,), torch.nan)
            return PairLogps(*policies, *references, *lengths, strength=strength, **kl)
        case "completions":
            good = torch.arange(2 * n) < n
            baseline = torch.full((1,), 3.0 * varied), torch.zeros(1)
            return JudgedLogps(torch.cat(policies), torch.cat(references), good, torch.cat(lengths), *baseline)
    rank = torch.tensor([1.0, 2.0]).repeat(n, 1)
    return RankedLogps(torch.stack(policies, 1), torch.stack(references, 1), rank, torch.stack(lengths, 1))


def _weights(term: Term, gradients: Mapping[str, Tensor]) -> tuple[Curve, Curve]:
    match term.traits.kind:
        case "pairs":
            chosen, rejected = gradients["policy_chosen"], gradients["policy_rejected"]
        case "completions":
            chosen, rejected = gradients["policy"].chunk(2)
        case _:
            chosen, rejected = gradients["policy"].unbind(1)
    return -chosen.double().numpy() + 0.0, rejected.double().numpy() + 0.0
