"""What a candidate is judged by: how much its implicit reward says about preferences that it was not trained on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sartor.evaluate.statistics import Estimate, mean

PRICE = 0.1  # of a nat of KL, in standard deviations of the score: what the RLHF objective calls β
NEWTON = 30  # steps to the best temperature: each at least halves what is left
FOLDS = 2
DIGITS = 6  # behind the point


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

    def kept(self) -> "Outcome":
        """With the digits that the archive keeps: a search must not decide by more than it finds again."""
        digits = {name: round(value, DIGITS) for name, value in self.measures.items()}
        return replace(self, values=tuple(round(value, DIGITS) for value in self.values), measures=digits)


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


@dataclass(frozen=True)
class Scored:
    """Branches that the reference drew, with their true scores and the prompt of each, numbered from 0."""

    score: Float[Tensor, " branches"]
    prompt: Int[Tensor, " branches"]

    @property
    def price(self) -> float:
        """What a nat of KL costs, in units of the score: a tenth of its spread among the reference's own answers."""
        return PRICE * float(self.score.std())

    def apart(self, logratios: Float[Tensor, "*runs branches"]) -> Float[Tensor, "*runs branches"]:
        """Log-ratios less the mean of their prompt."""
        return logratios - _by_prompt(logratios, self.prompt)[..., self.prompt]

    @property
    def free(self) -> Int[Tensor, " prompts"]:
        """Degrees of freedom of each prompt's answers once their mean is taken off."""
        return torch.bincount(self.prompt) - 1

    def fisher(
        self, logratios: Float[Tensor, "*runs branches"]
    ) -> tuple[Float[Tensor, "*runs branches"], Float[Tensor, "*runs 1"]]:
        """What of each branch's φ is in F·θ, and θᵀFθ / 2, where ``logratios`` are φ·θ.

        F is the mean over prompts of the covariance of φ.
        """
        shares = self.apart(logratios) / (self.free[self.prompt] * len(self.free))
        return shares, (shares * logratios).sum(-1, keepdim=True) / 2


def judged(
    logratios: Float[Tensor, "candidates settings branches"],
    pairs: Pairs,
    settings: Sequence[Setting],
    scored: Scored | None = None,
) -> list[Outcome]:
    """Judge candidates by the log-ratios that training gave to held-out branches.

    With true scores by :func:`worth`, else by :func:`bits`. See :func:`choose` for how each chooses its setting.
    """
    finite = torch.isfinite(logratios).all(-1, keepdim=True)
    known = torch.where(finite, logratios, 0.0).double()
    values = bits(known, pairs) if scored is None else worth(known, scored)
    values = torch.where(finite, values, -math.inf)
    found = []
    for own, (scores, at) in zip(known, map(choose, values), strict=True):
        seen = measures(own[at], pairs) if scored is None else forecast(own[at], pairs, scored)
        found.append(Outcome(settings[at], tuple(scores.tolist()), seen))
    return found


def choose(values: Float[Tensor, "settings prompts"]) -> tuple[Float[Tensor, " prompts"], int]:
    """Scores by prompt of a candidate that chose its setting, and the setting that is best on all prompts.

    The setting is chosen on one half of the prompts and the scores are those on the other half, both ways, so that luck
    among settings does not count.
    """
    fold = torch.arange(values.shape[1]) % FOLDS
    scores = torch.empty_like(values[0])
    for here in (fold == i for i in range(FOLDS)):
        elsewhere = values[:, ~here] if (~here).any() else values
        scores[here] = values[int(elsewhere.mean(-1).argmax())][here]
    return scores, int(values.mean(-1).argmax())


def bits(logratios: Float[Tensor, "*runs branches"], pairs: Pairs) -> Float[Tensor, "*runs prompts"]:
    """How much the implicit reward says about preferences, in bits per pair: 1 + mean log₂ σ(t·ρ) of each prompt.

    ρ is the margin of a held-out pair; the temperature t ≥ 0 is the best one for all prompts together, so that the
    scale of a loss does not count. 0 is a coin, 1 certainty.
    """
    margins = logratios[..., pairs.better] - logratios[..., pairs.worse]
    t = _temperature(margins, pairs.weight.double())
    found = 1 + torch.nn.functional.logsigmoid(t[..., None] * margins) / math.log(2)
    return _by_prompt(found, pairs.prompt)


def worth(logratios: Float[Tensor, "*runs branches"], scored: Scored) -> Float[Tensor, "*runs prompts"]:
    """What a policy's own answers may be expected to score, less the price of their KL, by prompt.

    Told from answers that the reference drew.
    """
    reward, kl = _reward_and_kl(logratios, scored)
    return reward - scored.price * kl


def forecast(logratios: Float[Tensor, " branches"], pairs: Pairs, scored: Scored) -> dict[str, float]:
    """:func:`measures` of a policy of which log-ratios are known to first order, and what its own answers are like.

    To first order log-ratios average to 0 over the reference's answers, and so chances of all answers sum to more than
    one. Their sum is E[e^d] = e^(Var(d) / 2) where d is normal: a policy's true log-ratios are lower by its KL.
    """
    reward, kl = _reward_and_kl(logratios, scored)
    found = measures(logratios - kl[..., scored.prompt], pairs)
    return {**found, "reward": float(reward.mean()), "kl": float(kl.mean())}


def _reward_and_kl(logratios: Tensor, scored: Scored) -> tuple[Tensor, Tensor]:
    """The reference's mean score plus Cov(d, score), and Var(d) / 2, by prompt, with d the log-ratio.

    Exact where d and the score are jointly normal under the reference, since then a policy π_ref · e^d only moves their
    means. Reweighting the n answers by e^d instead could gain no more than the best of them has, and go no further than
    log n nats.
    """
    d, score = scored.apart(logratios), scored.score.to(logratios.dtype)
    gain, square = _sums(d * score, scored.prompt), _sums(d * d, scored.prompt)
    return _by_prompt(score, scored.prompt) + gain / scored.free, square / scored.free / 2


def measures(logratios: Float[Tensor, " branches"], pairs: Pairs) -> dict[str, float]:
    """Accuracy, margin, and how far chosen and rejected were moved, in nats; each prompt counts the same."""
    weight = pairs.weight.double()
    margins = logratios[pairs.better] - logratios[pairs.worse]
    right = (margins > 0).double() + 0.5 * (margins == 0)
    return {
        "accuracy": float((right * weight).sum()),
        "margin": float((margins * weight).sum()),
        "chosen": float((logratios[pairs.better] * weight).sum()),
        "rejected": float((logratios[pairs.worse] * weight).sum()),
    }


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


def _by_prompt(values: Tensor, prompt: Tensor) -> Tensor:
    """Means over each prompt's entries."""
    return _sums(values, prompt) / torch.bincount(prompt)


def _sums(values: Tensor, prompt: Tensor) -> Tensor:
    sums = values.new_zeros(*values.shape[:-1], int(prompt.max()) + 1)
    return sums.index_add_(-1, prompt, values)
