"""PADLL: DPO at half weight for pairs on the wrong side."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def padll(pair: PairLogps, *, beta: float = 0.05) -> Float[Tensor, " pairs"]:
    """Performance adaptive decay logistic loss: DPO that trusts a pair less where the policy disagrees with it.

    A pair with a negative margin may be mislabelled, so it counts half.

    Formula:
        0.9 (1 - 0.5·1[ρ < 0]) log(1 + exp(-z))  (eq. 18)

    Use it:
        As a plain guard against wrong labels. It is the mildest change to dpo among the discovered losses (MT-Bench
        7.941), and did as well as DPO on held-out tasks. A global factor such as 0.9 does nothing under AdamW.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the KL leash.

    Returns:
        Loss per pair. It jumps by half at ρ = 0. Found, paper and released code agree.

    Examples:
        >>> policy = torch.tensor([1.0, -1.0]), torch.zeros(2)
        >>> padll(PairLogps(*policy, torch.zeros(2), torch.zeros(2), *[torch.tensor([5, 5])] * 2), beta=1.0)
        tensor([0.2819, 0.5910])

    References:
        Lu et al., Discovering Preference Optimization Algorithms with and for Large Language Models, 2024,
        appendix E.3. https://arxiv.org/abs/2406.08414
    """
    return torch.where(pair.margin < 0, 0.45, 0.9) * F.softplus(-beta * pair.margin)  # eq. 18
