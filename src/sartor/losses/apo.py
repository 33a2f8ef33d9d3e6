"""Anchored preference optimisation: say where each side's likelihood should go, not only their difference."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def apo_zero(pair: PairLogps, *, beta: float = 0.1) -> Float[Tensor, " pairs"]:
    """APO-zero: raise the chosen answers and lower the rejected ones, for data better than the model.

    DPO leaves open whether both likelihoods rise or fall. Each reward gets its own term here, and the slope of the
    sigmoid fades on both sides of zero, which anchors rewards near the reference.

    Formula:
        -σ(r_w) + σ(r_l) + 1,  r = β log π / π^ref  (eq. 7, up to the constant)

    Use it:
        When chosen answers are better than what the model would write. If they are worse, ``apo_down``.

    Args:
        pair: log-probabilities of the four sides.
        beta: reward per nat of log-ratio.

    Returns:
        Loss per pair, between 0 and 2.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> apo_zero(pair, beta=0.5)  # r_w = 0.5, r_l = -0.5
        tensor([0.7551])

    References:
        D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions, 2024.
        https://arxiv.org/abs/2408.06266
    """
    return F.sigmoid(-beta * pair.chosen_logratio) + F.sigmoid(beta * pair.rejected_logratio)  # eq. 7


def apo_down(pair: PairLogps, *, beta: float = 0.1) -> Float[Tensor, " pairs"]:
    """APO-down: lower both answers, the rejected one more, for data worse than the model.

    If the model already writes better than the chosen answers, imitating them is a step back. The difference of the two
    still tells which way is better.

    Formula:
        σ(r_w) - σ(r_w - r_l) + 1,  r = β log π / π^ref  (eq. 8, up to the constant)

    Use it:
        When a strong model is trained on pairs from weaker ones. Otherwise ``apo_zero``.

    Args:
        pair: log-probabilities of the four sides.
        beta: reward per nat of log-ratio.

    Returns:
        Loss per pair, between 0 and 2.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> apo_down(pair, beta=0.5)
        tensor([0.8914])

    References:
        D'Oosterlinck et al., as for ``apo_zero``. https://arxiv.org/abs/2408.06266
    """
    return F.sigmoid(beta * pair.chosen_logratio) + F.sigmoid(-beta * pair.margin)  # eq. 8
