"""Alignment by optimal transport: whole distributions of rewards compared, not single pairs."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def _dominance(ours: Tensor, theirs: Tensor, beta: float, label_smoothing: float) -> Float[Tensor, " pairs"]:
    """The loss at each quantile, given to the pair whose value of ``ours`` stands there."""
    sorted_ours, order = torch.sort(ours)
    logit = beta * (sorted_ours - torch.sort(theirs).values)
    losses = -(1 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)
    return torch.empty_like(losses).scatter(0, order, losses)


def aot(pair: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Float[Tensor, " pairs"]:
    """AOT on pairs: the policy's margins should exceed the reference's at every quantile of the batch.

    In one dimension, optimal transport is sorting. The i-th smallest margin of the policy is set against the i-th
    smallest of the reference: a penalty on every violation of first-order stochastic dominance.

    Formula:
        -log σ(β (u_(i) - v_(i))),  u = log π_w - log π_l,  v = log π_w^ref - log π_l^ref,  (i): i-th smallest

    Use it:
        When the distribution matters more than each single pair, as with noisy pairs. It needs large batches: quantiles
        are over the whole optimizer batch, and with one pair this is DPO.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the KL leash, as in DPO.
        label_smoothing: share of labels thought to be flipped, as in cDPO.

    Returns:
        Loss per pair, in nats: that of the quantile at which its margin stands.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> aot(pair, beta=0.5)
        tensor([0.3133])

    References:
        Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport, 2024.
        https://arxiv.org/abs/2406.05882
    """
    policy, reference = pair.policy_chosen - pair.policy_rejected, pair.reference_chosen - pair.reference_rejected
    return _dominance(policy, reference, beta, label_smoothing)


def aot_unpaired(pair: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Float[Tensor, " pairs"]:
    """AOT, unpaired: rewards of chosen answers should exceed those of rejected ones at every quantile of the batch.

    Formula:
        -log σ(β (u_(i) - v_(i))),  u = log π_w / π_w^ref,  v = log π_l / π_l^ref,  (i): i-th smallest

    Use it:
        When the two sides need not answer the same prompt. Who was compared with whom is forgotten.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the KL leash, as in DPO.
        label_smoothing: share of labels thought to be flipped, as in cDPO.

    Returns:
        Loss per pair, in nats: that of the quantile at which its chosen answer stands.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> aot_unpaired(pair, beta=0.5)
        tensor([0.3133])

    References:
        Melnyk et al., as for ``aot``. https://arxiv.org/abs/2406.05882
    """
    return _dominance(pair.chosen_logratio, pair.rejected_logratio, beta, label_smoothing)
