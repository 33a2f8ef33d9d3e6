"""CELL: the average of logistic and exponential loss."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.losses.stable import tangent_exp
from sartor.types import PairLogps


def cell(pair: PairLogps, *, beta: float = 0.05) -> Float[Tensor, " pairs"]:
    """Combined exponential and logistic loss: DPO that pushes wrongly ordered pairs ever harder.

    The exponential is the loss of AdaBoost. Its gradient grows without bound on the wrong side, where DPO's
    saturates at β.

    Formula:
        0.5 log(1 + exp(-z)) + 0.5 exp(-z)  (eq. 26)

    Use it:
        To study it, with labels that you trust (MT-Bench 7.925 in the search). One mislabelled pair far on the wrong
        side dominates the batch. For small margins it is dpo with a larger β.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the KL leash. The released code gave NaN at 5.

    Returns:
        Loss per pair. exp(-z) continues as a straight line below z = -20; there the formula overflows.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.zeros(1) for _ in range(4)), *[torch.tensor([5])] * 2)
        >>> cell(pair)  # z = 0: (log 2 + 1) / 2
        tensor([0.8466])

    References:
        Lu et al., Discovering Preference Optimization Algorithms with and for Large Language Models, 2024,
        appendix E.5. https://arxiv.org/abs/2406.08414
    """
    z = beta * pair.margin
    return 0.5 * F.softplus(-z) + 0.5 * tangent_exp(-z)  # eq. 26
