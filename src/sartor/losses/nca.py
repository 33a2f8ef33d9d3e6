"""Noise contrastive alignment: each side against the reference, not only against the other side."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def nca(pair: PairLogps, *, beta: float = 0.01) -> Float[Tensor, " pairs"]:
    """NCA on pairs: raise the chosen completion's own likelihood, so that it cannot fall along with the rejected one.

    DPO knows only the difference of the two rewards, and both likelihoods may sink together. NCA asks of every
    completion whether it came from the policy or the reference, which ties down each reward by itself.

    Formula:
        -log σ(r_w) - ½ log σ(-r_w) - ½ log σ(-r_l),  r = β log π / π^ref

    Use it:
        When DPO lowers the likelihood of chosen answers and that hurts, as in reasoning or code. Where only the ranking
        matters it moves more slowly than DPO. Same values as TRL's `nca_pair`.

    Args:
        pair: log-probabilities of the four sides.
        beta: reward per nat of log-ratio.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> nca(pair, beta=0.5)  # r_w = 0.5, r_l = -0.5
        tensor([1.1982])

    References:
        Chen et al., Noise Contrastive Alignment of Language Models with Explicit Rewards, 2024.
        https://arxiv.org/abs/2402.05369
    """
    chosen, rejected = beta * pair.chosen_logratio, beta * pair.rejected_logratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
