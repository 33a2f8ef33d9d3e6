"""Efficient exact optimisation: the KL divergence of DPO's fit, the other way round."""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def exo(pair: PairLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Float[Tensor, " pairs"]:
    """EXO on pairs: match the preference distribution with the reverse KL, so that the policy seeks its modes.

    RL with a KL leash minimises a reverse KL to the optimal policy; DPO's cross-entropy is the forward KL, which covers
    mass and blurs. EXO keeps the direction of RL. Its gradient fades where the model is confident, right or wrong.

    Formula:
        q log(q / (1 - ε)) + (1 - q) log((1 - q) / ε),  q = σ(β ρ),
        ρ = log π_w / π_w^ref - log π_l / π_l^ref  (eq. 16)

    Use it:
        From a reference that already ranks most pairs rightly. A pair that is wrong by a wide margin is almost not
        learnt from, so it also shrugs off gross label errors.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the KL leash, as in DPO (the paper's β_π).
        label_smoothing: ε, the chance left to the rejected side. It must be above 0: at 0 the reverse KL is infinite.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> exo(pair, beta=0.5)  # q = 0.7311, ε = 0.001
        tensor([1.2763])

    References:
        Ji et al., Towards Efficient Exact Optimization of Language Model Alignment, 2024.
        https://arxiv.org/abs/2402.00856
    """
    logit = beta * pair.margin
    won = F.sigmoid(logit) * (F.logsigmoid(logit) - math.log1p(-label_smoothing))
    lost = F.sigmoid(-logit) * (F.logsigmoid(-logit) - math.log(label_smoothing))
    return won + lost  # eq. 16
