"""AQFL: logistic and hinge loss, blended by the distance from a batch quantile."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def aqfl(pair: PairLogps, *, beta: float = 0.05, tau: float = 0.05, variant: str = "paper") -> Float[Tensor, " pairs"]:
    """Adaptive quantile feedback loss: logistic loss for pairs far from the batch's middle, some hinge near it.

    Formula:
        r L(z) + (1 - r) H(z),  r = σ(0.1 |x - m₂|)  (eq. 20-22)
        paper:    x = z/τ,  m₁ = E[σ(-x)] Var[x],  m₂ = m₁ + 0.05 σ(E[x] - m₁)  (eq. 23-24)
        released: x = z/τ,  m₁ = E[σ(-x)] Std[x],  m₂ = m₁ + 0.05 (σ(E[x]) - m₁)
        found:    x = ρ, the rest as in released

    Use it:
        To study it (MT-Bench 7.931 in the search). Its gate needs |x - m₂| in the tens to move, so it is close to
        the average of DPO and hinge for most of training.

    Args:
        pair: log-probabilities of the four sides. The statistics are over all pairs given (the optimizer batch), the
            variance with n in the denominator, so one pair has variance 0. The search had micro-batches of 2, and
            n - 1. Gradient flows through them, as in the found code.
        beta: strength of the KL leash.
        tau: the scale of margins in the gate; not read by ``found``.
        variant: which of the three. The paper's two formulas differ from both codes: a variance where they have a
            standard deviation, and the bracket of m₂.

    Returns:
        Loss per pair.

    Examples:
        >>> pair = PairLogps(*(torch.zeros(1) for _ in range(4)), *[torch.tensor([5])] * 2)
        >>> aqfl(pair)  # z = 0 and no variance: m₂ = 0.025, r = σ(0.0025), r log 2 + (1 - r)
        tensor([0.8464])

    References:
        Lu et al., Discovering Preference Optimization Algorithms with and for Large Language Models, 2024,
        appendix E.4. https://arxiv.org/abs/2406.08414
    """
    if variant not in ("found", "paper", "released"):
        raise ValueError(f"unknown variant {variant!r}; known: found, paper, released")
    z = beta * pair.margin
    x = pair.margin if variant == "found" else z / tau
    wrong = torch.sigmoid(-x).mean()
    if variant == "paper":
        quantile = wrong * torch.var(x, unbiased=False)  # eq. 24
        quantile = quantile + 0.05 * torch.sigmoid(x.mean() - quantile)  # eq. 23
    else:
        quantile = wrong * torch.std(x, unbiased=False)  # torch gives it gradient 0 at 0
        quantile = quantile + 0.05 * (torch.sigmoid(x.mean()) - quantile)
    distance = 0.1 * (x - quantile).abs()
    return torch.sigmoid(distance) * F.softplus(-z) + torch.sigmoid(-distance) * F.relu(1 - z)  # eq. 20
