"""DPO on data with ties: preference models that give a chance to «no preference»."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def dpo_rao_kupper(pair: PairLogps, *, beta: float = 0.1, nu: float = 3.0) -> Float[Tensor, " pairs"]:
    """DPO with the Rao-Kupper model: ties are learnt from, not thrown away.

    Bradley-Terry has no third outcome. Rao and Kupper let people see a winner only if rewards differ by more than
    log ν; a tie then says that two answers are about equally good, which pulls their margin to zero.

    Formula:
        pair: -log σ(d - log ν);  tie: -log[(ν² - 1) σ(d - log ν) σ(-d - log ν)],
        d = β [log π_w / π_w^ref - log π_l / π_l^ref]

    Use it:
        When annotators could call a tie. Ties act as a leash to the reference. On data without ties, use DPO.

    Args:
        pair: log-probabilities of the four sides; ``tie`` says which pairs are ties.
        beta: strength of the KL leash, as in DPO.
        nu: ν > 1, how readily people call a tie; at 3, equal answers tie half of the time.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> dpo_rao_kupper(pair, beta=0.5)  # d = 1, log ν = 1.0986
        tensor([0.7437])

    References:
        Chen et al., On Extending Direct Preference Optimization to Accommodate Ties, 2024.
        https://arxiv.org/abs/2409.17431
    """
    d, threshold = beta * pair.margin, math.log(nu)
    won, lost = F.logsigmoid(d - threshold), F.logsigmoid(-d - threshold)
    return torch.where(pair.tie, -math.log(nu**2 - 1) - won - lost, -won)


def dpo_davidson(pair: PairLogps, *, beta: float = 0.1, nu: float = 1.0) -> Float[Tensor, " pairs"]:
    """DPO with the Davidson model: ties again, their chance set by the geometric mean of the two strengths.

    Formula:
        pair: -log(1 / Z);  tie: -log(2ν e^(-d/2) / Z),  Z = 1 + e^-d + 2ν e^(-d/2),  d as in Rao-Kupper

    Use it:
        As ``dpo_rao_kupper``; here the chance of a tie falls more slowly as answers move apart. ν → 0 is DPO.

    Args:
        pair: log-probabilities of the four sides; ``tie`` says which pairs are ties.
        beta: strength of the KL leash, as in DPO.
        nu: ν > 0, how readily people call a tie; at 1, equal answers tie half of the time.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> dpo_davidson(pair, beta=0.5)  # Z = 1 + e^-1 + 2 e^-0.5
        tensor([0.9482])

    References:
        Chen et al., as for ``dpo_rao_kupper``. https://arxiv.org/abs/2409.17431
    """
    d, tie_weight = beta * pair.margin, math.log(2 * nu)
    won = torch.logaddexp(F.softplus(-d), tie_weight - d / 2)
    return torch.where(pair.tie, F.softplus(torch.logaddexp(d / 2, -d / 2) - tie_weight), won)
