"""LRML, the loss that DiscoPOP is named for."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.losses.stable import tangent_exp
from sartor.types import PairLogps


def lrml(pair: PairLogps, *, beta: float = 0.05, tau: float = 0.05, variant: str = "paper") -> Float[Tensor, " pairs"]:
    """Log-ratio modulated loss (DiscoPOP): logistic on the wrong side, exponential on the right side.

    The gate's own slope makes the loss non-convex: at τ = 0.05 it has a minimum at z/τ = -2.37 and a maximum at 1.44.
    A pair that never gets past the maximum settles in the minimum, on the wrong side. The authors read this as a
    filter for noisy pairs.

    Formula:
        (1 - σ(z/τ)) log(1 + exp(-z)) + σ(z/τ) exp(-z)  (eq. 5)

    Use it:
        To reproduce DiscoPOP (MT-Bench 7.916). At the start all margins are 0, where its slope lowers them, and in
        the paper its pair accuracy is the lowest. On IMDb it did not learn at beta 0.01.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the KL leash.
        tau: width of the gate, in units of z. From about 0.2 on the loss is monotone.
        variant: ``paper`` and ``released`` gate on z/τ, ``found`` on ρ; the same at beta = tau. TRL's ``discopop`` is
            the paper's form with its unstable product.

    Returns:
        Loss per pair. Gate times exponential is one exponential here, of log σ(z/τ) - z, so that neither factor
        overflows alone (the NaN of the released code at beta 2.5 and 5). It continues as a straight line where that
        exponent exceeds 20, which only happens for τ > 1, or ``found`` with beta > 1.

    Examples:
        >>> pair = PairLogps(*(torch.zeros(1) for _ in range(4)), *[torch.tensor([5])] * 2)
        >>> lrml(pair)  # z = 0: (log 2 + 1) / 2
        tensor([0.8466])

    References:
        Lu et al., Discovering Preference Optimization Algorithms with and for Large Language Models, 2024.
        https://arxiv.org/abs/2406.08414
    """
    if variant not in ("found", "paper", "released"):
        raise ValueError(f"unknown variant {variant!r}; known: found, paper, released")
    z = beta * pair.margin
    gate = pair.margin if variant == "found" else z / tau
    return torch.sigmoid(-gate) * F.softplus(-z) + tangent_exp(F.logsigmoid(gate) - z)  # eq. 5
