"""Calibrated DPO: the margin, and beside it the level of each reward."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def cal_dpo(pair: PairLogps, *, beta: float = 0.002, weight: float = 1.0) -> Float[Tensor, " pairs"]:
    """Cal-DPO: DPO whose rewards also have the right level, so that the chosen likelihood rises and does not sink.

    DPO's loss does not change if both rewards move together. Two squares pull them to the values that rewards of +1/2
    and -1/2 have at the optimum, which ties down the level.

    Formula:
        -log σ(h_w - h_l) + λ [(h_w - 1/(2β))² + (h_l + 1/(2β))²],  h = log π / π^ref

    Use it:
        When DPO lowers the chosen likelihood. The squares dominate far from their targets, so it acts much like SPPO
        with hard labels; β sets the targets and does not scale the margin.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the leash: the targets are ±1/(2β) nats, 250 at the released recipe's 0.002.
        weight: λ. 1 is the paper; the released code uses 1/2 (and means over the batch, which come to the same).

    Returns:
        Loss per pair: nats, plus nats squared.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> cal_dpo(pair, beta=0.25)  # 0.1269 + (1 - 2)² + (-1 + 2)²
        tensor([2.1269])

    References:
        Xiao et al., Cal-DPO: Calibrated Direct Preference Optimization for Language Model Alignment, 2024.
        https://arxiv.org/abs/2412.14516
    """
    target = 0.5 / beta
    level = (pair.chosen_logratio - target) ** 2 + (pair.rejected_logratio + target) ** 2
    return -F.logsigmoid(pair.margin) + weight * level
