"""What a candidate is judged by: how much its implicit reward says about preferences that it was not trained on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sartor.evaluate.statistics import Estimate, mean

NEWTON = 30  # steps to the best temperature: each at least halves what is left
FOLDS = 2


@dataclass(frozen=True)
class Setting:
    """What every candidate may choose for itself, so that its shape is compared and not its scale."""

    beta: float
    learning_rate: float

    def __str__(self) -> str:
        return f"β {self.beta:g}, learning rate {self.learning_rate:g}"


@dataclass(frozen=True)
class Outcome:
    """How a candidate fared on a rung.

    ``values`` are its score on each held-out prompt, the units that it is compared with others on; ``measures`` what
    else was seen. ``seconds`` is its share of the time of the batch that it was run in.
    """

    setting: Setting
    values: tuple[float, ...]
    measures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def fitness(self) -> float:
        """The mean score, by which candidates are ordered; minus infinity where training fell apart."""
        value = sum(self.values) / len(self.values)
        return value if math.isfinite(value) else -math.inf

    @property
    def score(self) -> Estimate:
        """The same with its interval, prompts as units."""
        return mean(self.values)

    def record(self) -> dict[str, Any]:
        """As it stands in the archive."""
        return {
            "beta": self.setting.beta,
            "learning_rate": self.setting.learning_rate,
            "values": [round(value, 7) for value in self.values],
            "measures": {name: round(value, 7) for name, value in self.measures.items()},
        }


@dataclass(frozen=True)
class Pairs:
    """Pairs of branches: the better one, the worse one, and the prompt of each, numbered from 0."""

    better: Int[Tensor, " pairs"]
    worse: Int[Tensor, " pairs"]
    prompt: Int[Tensor, " pairs"]

    @property
    def weight(self) -> Float[Tensor, " pairs"]:
        """What each counts, so that each prompt counts the same: sums to 1."""
        counts = torch.bincount(self.prompt)
        return 1.0 / (counts[self.prompt] * (counts > 0).sum())


def outcomes(
    logratios: Float[Tensor, "candidates settings branches"], pairs: Pairs, settings: Sequence[Setting]
) -> list[Outcome]:
    """Judge candidates by the log-ratios that training gave to held-out branches.

    The score is in bits per pair: 1 + mean log₂ σ(t·ρ), where ρ is the margin of a held-out pair. 0 is a coin, 1
    certainty. The temperature t ≥ 0 is fitted, and with several settings the best one is chosen, on one half of the
    prompts, and the score is that on the other half, both ways: so neither the scale of a loss nor luck among settings
    counts. The setting of the outcome is the best on all prompts.
    """
    margins = logratios[..., pairs.better] - logratios[..., pairs.worse]
    finite = torch.isfinite(margins).all(-1, keepdim=True)
    margins = torch.where(finite, margins, 0.0).double()
    prompts = int(pairs.prompt.max()) + 1
    values = torch.empty(len(margins), prompts, dtype=torch.float64)
    for fold in range(FOLDS):
        here = pairs.prompt % FOLDS == fold
        chosen, known = margins[..., here], _best(margins[..., ~here], pairs.weight[~here])
        bits = _bits(chosen, known.temperature)
        best = bits.gather(1, known.setting[:, None, None].expand(-1, 1, bits.shape[-1]))[:, 0]
        values = _by_prompt(values, best, pairs.prompt[here])
    whole = _best(margins, pairs.weight)
    found = []
    for i, at in enumerate(whole.setting.tolist()):
        broken = not bool(finite[i].all())
        scores = [-math.inf] * prompts if broken else values[i].tolist()
        found.append(Outcome(settings[at], tuple(scores), _measures(margins[i, at], logratios[i, at], pairs)))
    return found


@dataclass(frozen=True)
class _Best:
    """The best setting of each candidate, and the best temperature of each setting."""

    setting: Int[Tensor, " candidates"]
    temperature: Float[Tensor, "candidates settings"]


def _best(margins: Tensor, weight: Tensor) -> _Best:
    weight = (weight / weight.sum()).double()
    t = _temperature(margins, weight)
    return _Best((_bits(margins, t) * weight).sum(-1).argmax(-1), t)


def _bits(margins: Tensor, temperature: Tensor) -> Tensor:
    return 1 + torch.nn.functional.logsigmoid(temperature[..., None] * margins) / math.log(2)


def _temperature(margins: Tensor, weight: Tensor) -> Tensor:
    """t ≥ 0 that maximises Σ weight·log σ(t·margin): concave in t, so Newton's method, held between bounds."""
    scale = (margins.abs() * weight).sum(-1).clamp(min=1e-12)
    x = margins / scale[..., None]  # of size 1, so that one range of t serves all
    low, high = torch.zeros_like(scale), torch.full_like(scale, 100.0)
    t = torch.ones_like(scale)
    for _ in range(NEWTON):
        p = torch.sigmoid(-t[..., None] * x)
        slope = (weight * x * p).sum(-1)
        curve = (weight * x * x * p * (1 - p)).sum(-1).clamp(min=1e-12)
        low, high = torch.where(slope > 0, t, low), torch.where(slope > 0, high, t)
        step = t + slope / curve
        t = torch.where((step > low) & (step < high), step, (low + high) / 2)
    return t / scale


def _by_prompt(values: Tensor, bits: Tensor, prompt: Tensor) -> Tensor:
    """Mean bits of each prompt's pairs, put in their places."""
    sums = torch.zeros_like(values).index_add_(1, prompt, bits)
    counts = torch.bincount(prompt, minlength=values.shape[1])
    return torch.where(counts > 0, sums / counts.clamp(min=1), values)


def _measures(margins: Tensor, logratios: Tensor, pairs: Pairs) -> dict[str, float]:
    """Accuracy, margin, and how far chosen and rejected were moved, in nats; each prompt counts the same."""
    weight = pairs.weight.double()
    right = (margins > 0).double() + 0.5 * (margins == 0)
    return {
        "accuracy": float((right * weight).sum()),
        "margin": float((margins * weight).sum()),
        "chosen": float((logratios[pairs.better].double() * weight).sum()),
        "rejected": float((logratios[pairs.worse].double() * weight).sum()),
    }
