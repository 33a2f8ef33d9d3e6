"""What can be known of a candidate before any training: whether it is fit to train, what it does, and what it is like.

Milliseconds each: all stress batches of one size are computed at once, and likeness is one product with a matrix of
fingerprints. Different from ``objectives.contract.examine``, which finds out the same of a function that it can only
call: of a tree the inputs, the batch statistics and the order of the batch are known by reading it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sartor.discover.language.expression import Expression
from sartor.discover.language.program import BETA, Program, as_term, sides_of
from sartor.objectives.catalogue import candidates
from sartor.objectives.contract import Inputs, stress
from sartor.objectives.shape import LENGTHS, MARGINS, SHIFTS, Candidate, Likeness, Shape, fingerprint, grid, shape
from sartor.types import PairLogps

SAME = 0.999  # cosine of two fingerprints from which on two objectives train alike, up to the learning rate
STRESSED_AT = (1.0, 0.05)  # β: a large one for overflow, and a usual one at which few results are denormal, and slow
PRECISIONS = (torch.float32, torch.bfloat16)
# A candidate that is an earlier one at another β: the earlier ones are kept at wide steps of β, the new one is asked at
# small steps within one of them, so that every ratio of the two is met to within FINE.
BETAS = tuple(np.geomspace(0.01, 1.0, 14).tolist())
FINE = 3
SKETCH = 64  # numbers that a fingerprint is sketched in: those whose sketches are far apart need not be compared
NOTHING = "its gradient is zero everywhere, so nothing would be learnt"
PROBED = 10.0  # nats to either side of 0, where the direction of training is judged


@dataclass(frozen=True)
class Screened:
    """What the screens found. ``refusal`` says why a candidate is not worth training; empty if it may."""

    refusal: str
    fingerprints: Float[Tensor, "betas points"] = field(default_factory=lambda: torch.zeros(1, 0), repr=False)
    likeness: Likeness | None = None

    @property
    def fingerprint(self) -> Float[Tensor, " points"]:
        """At the β it was screened at; the other rows are at small steps above it, and then at ``BETAS``."""
        return self.fingerprints[0]


def screen(tree: Expression, beta: float) -> Screened:
    """Put a candidate through all screens at one β; the first that it fails refuses it."""
    if not tree.inputs & {"policy_chosen", "policy_rejected", "chosen_logratio", "rejected_logratio", "margin"}:
        return Screened("it does not read what the policy says, so nothing would be learnt")
    program = Program(tree)
    if refusal := _unstable(program):
        return Screened(refusal)
    step = BETAS[1] / BETAS[0]
    found = fingerprints(program, (*(beta * step ** (i / FINE) for i in range(FINE)), *BETAS))
    if not found[0].any():
        return Screened(NOTHING, found)
    if refusal := _backwards(found[0]):
        return Screened(refusal, found)
    return Screened("", found, _nearest_of_catalogue(found[0]))


def fingerprints(program: Program, betas: Sequence[float]) -> Float[Tensor, "betas points"]:
    """``objectives.shape.fingerprint`` of a tree at several β at once, a row each."""
    sides = {name: side.expand(len(betas), -1) for name, side in sides_of(_pairs(grid("pairs"))).items()}
    found = program.weights(sides, torch.tensor(betas)[:, None])
    return torch.nn.functional.normalize(torch.cat([-found.chosen, found.rejected], 1).double(), dim=1).float()


def _unstable(program: Program) -> str:
    """The first input at which a value or a weight is not finite."""
    everything = stress_batches()
    # Where no pair depends on the others its batch says nothing, and the largest batches hold every combination.
    for sides in everything if program.mixes else everything[:1]:
        for precision in PRECISIONS:
            given = {name: side.to(precision) for name, side in sides.items()}
            betas = torch.tensor(STRESSED_AT, dtype=precision).view(-1, 1, 1)
            wide = {name: side.expand(len(STRESSED_AT), *side.shape) for name, side in given.items()}
            found = program.weights(wide, betas)
            for what, values in {"value": found.loss, "weight": found.chosen + found.rejected}.items():
                if not torch.isfinite(values).all():
                    at = (~torch.isfinite(values)).nonzero()[0].tolist()
                    entry = ", ".join(f"{name} {float(side[at[1], at[2]]):g}" for name, side in sides.items())
                    where = f"at β {STRESSED_AT[at[0]]:g} in a batch of {values.shape[-1]} in {_name(precision)}"
                    return f"its {what} is {float(values[tuple(at)]):g} {where}, where {entry}"
    return ""


def _name(precision: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[precision]


@cache
def stress_batches() -> tuple[dict[str, Tensor], ...]:
    """Log-probs from 0 to -10,000 in every combination, as batches of 64, of 2 and of 1; each side [batches, pairs]."""
    found = []
    for size in (64, 2, 1):
        batches = [sides_of(_pairs(batch)) for batch in stress("pairs", size)][:64]
        found.append({name: torch.stack([batch[name] for batch in batches]) for name in batches[0]})
    return tuple(found)


def _pairs(inputs: Inputs) -> PairLogps:
    assert isinstance(inputs, PairLogps)
    return inputs


def _backwards(found: Float[Tensor, " points"]) -> str:
    """Whether training by it would, on the whole, lower the margin around where it starts."""
    chosen, rejected = found.chunk(2)
    near = torch.from_numpy(np.abs(MARGINS) <= PROBED).repeat_interleave(len(SHIFTS) * len(LENGTHS))
    pull = (chosen + rejected)[near]
    share = float((pull < 0).float().mean())
    if pull.sum() < 0 and share > 0.5:
        return f"its sign is wrong: within 10 nats it lowers {100 * share:.0f} % of margins"
    return ""


@cache
def _catalogue() -> tuple[tuple[Candidate, ...], Tensor]:
    pairs = [one for one in candidates() if one.term.traits.kind == "pairs"]
    for name in dict.fromkeys(one.term.name for one in pairs if one.term.beta is not None):
        # At the β of the screens too, so that a known loss is itself and not its neighbour's at the next β.
        term = next(one.term for one in pairs if one.term.name == name)
        own = replace(term, loss=partial(term.loss, beta=BETA), beta=BETA)
        pairs.append(Candidate(own, fingerprint(own)))
    return tuple(pairs), torch.from_numpy(np.stack([one.fingerprint for one in pairs])).float()


def _nearest_of_catalogue(found: Float[Tensor, " points"]) -> Likeness:
    known, matrix = _catalogue()
    cosines = matrix @ found
    best = int(cosines.argmax())
    # Where several are the same, the plain one is named.
    plain = [at for at in (cosines >= SAME).nonzero()[:, 0].tolist() if known[at].term.name == "dpo"]
    if plain and cosines[best] < 1 - 1e-6:
        best = max(plain, key=lambda at: float(cosines[at]))
    return Likeness(known[best].term.name, known[best].term.beta, float(cosines[best]))


@dataclass
class Seen:
    """Fingerprints of the candidates so far, at many β each, to recognise one that comes again."""

    numbers: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    sketches: list[Tensor] = field(default_factory=list)
    _sketches: Tensor | None = None

    def add(self, number: int, screened: Screened) -> None:
        """Remember a candidate by its number; one without a fingerprint resembles nothing."""
        if screened.refusal:
            return
        # At its own β too, where it comes again most often: what has a kink changes within one small step.
        kept = screened.fingerprints[[0, *range(FINE, len(screened.fingerprints))]]
        self.rows += list(kept)
        self.sketches.append(kept @ _projection())
        self.numbers += [number] * len(kept)
        self._sketches = None

    def twin(self, screened: Screened) -> tuple[int, float] | None:
        """The earlier candidate that trains alike, and the cosine; None where there is none."""
        if not self.rows or screened.refusal:
            return None
        if self._sketches is None:
            self._sketches = torch.cat(self.sketches)
        asked = screened.fingerprints[:FINE]
        # Distances between sketches are those between fingerprints to within a third; a wide berth is given to that.
        near = torch.cdist(self._sketches, asked @ _projection()).square() < 4 * 2 * (1 - SAME)
        best: tuple[int, float] | None = None
        for at in near.any(1).nonzero()[:, 0].tolist():
            cosine = float((asked @ self.rows[at]).max())
            if cosine >= SAME and (best is None or cosine > best[1] + 1e-6):
                best = self.numbers[at], cosine
        return best


@cache
def _projection() -> Float[Tensor, "points sketch"]:
    points = 2 * len(MARGINS) * len(SHIFTS) * len(LENGTHS)
    return torch.randn(points, SKETCH, generator=torch.Generator().manual_seed(0)) / SKETCH**0.5


def curve_of(screened: Screened) -> tuple[float, bool]:
    """Slope at margin 0 and whether the slope never falls, as far as the fingerprint shows."""
    chosen, rejected = screened.fingerprint.view(2, len(MARGINS), len(SHIFTS), len(LENGTHS))[:, :, 1, 0]
    slope = -(chosen + rejected) / 2
    rising = (slope.diff() > -1e-4 * slope.abs().max()).all()
    return float(slope[int(np.abs(MARGINS).argmin())]), bool(rising)


def in_words(tree: Expression, beta: float) -> list[str]:
    """What a plot of it would show, in words: for people and for language models."""
    drawn = shape(as_term(tree, beta=beta))
    words = [f"slope at margin 0: {drawn.slope:+.3g}", f"convex: {'yes' if drawn.convex else 'no'}"]
    words += [f"lowers the margin from {low:.3g} to {high:.3g} nats" for low, high in drawn.rises] or [
        "never lowers the margin"
    ]
    words += [_pulls(drawn, at) for at in (-20.0, 0.0, 20.0)]
    return words


def _pulls(drawn: Shape, margin: float) -> str:
    at = int(np.abs(drawn.margin - margin).argmin())
    return f"at margin {margin:g}: pulls chosen up by {drawn.chosen[at]:.3g}, rejected down by {drawn.rejected[at]:.3g}"
