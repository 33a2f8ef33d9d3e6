"""A preference objective of one's own."""

import torch.nn.functional as F
from torch import Tensor

from sartor.types import PairLogps


def caution(pair: PairLogps, *, beta: float = 0.1, patience: float = 4.0) -> Tensor:
    """DPO that gives up on pairs it has come to get badly wrong, as labels that are probably mistaken.

    Formula:
        p tanh(-log σ(β ρ) / p),  ρ the margin of log-ratios, p the patience

    Use it:
        As a starting point for a loss of your own. It saturates at p nats a pair.

    Args:
        pair: log-probabilities of the four sides.
        beta: KL leash.
        patience: p, the largest loss that a pair can have, in nats.

    Returns:
        Loss per pair, in nats.
    """
    loss = -F.logsigmoid(beta * pair.margin)
    return patience * (loss / patience).tanh()
