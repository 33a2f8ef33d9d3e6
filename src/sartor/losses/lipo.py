"""LiPO-λ: pairs of a ranked list, weighted by what swapping them would do to the ranking metric."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import RankedLogps


def lipo(ranked: RankedLogps, *, beta: float = 0.05) -> Float[Tensor, " prompts"]:
    """LiPO-λ: fits all pairs of a ranked list, those at the top of the list hardest.

    Learning to rank knows that not all mistakes are equal. LambdaLoss weighs a pair by how much the discounted
    cumulative gain of the list changes when the two swap places: by how far their labels are apart, and by how far
    apart, and how near the top, the policy now places them.

    Formula:
        Σ_{ψ_i > ψ_j} Δ_ij log(1 + exp(s_j - s_i)),  s = β (log π - log π_ref)  (eq. 8),
        Δ_ij = |2^ψ_i - 2^ψ_j| · |1/log₂(1 + τ_i) - 1/log₂(1 + τ_j)|,  τ: place by s, 1 is the highest

    Use it:
        For lists of four and more, where the top matters most. With two answers the weight is a constant (0.15)
        and this is dpo with a smaller learning rate.

    Args:
        ranked: log-probabilities of K answers per prompt. Data has ranks and no scores, so ψ is the paper's label
            for human rankings (section 5): the share of the K answers that are ranked lower. Tied answers make no
            pair.
        beta: strength of the KL leash; 0.05 is the paper's.

    Returns:
        Loss per prompt, summed over pairs. The weights carry no gradient. Equal scores are placed by rank: at the first
        step all are 0, and a shared place would make every weight 0 and stop learning before it began.

    Examples:
        >>> policy, rank = torch.tensor([[-9.0, -11.0]]), torch.tensor([[1.0, 2.0]])
        >>> ranked = RankedLogps(policy, torch.full((1, 2), -10.0), rank, torch.tensor([[5, 5]]))
        >>> lipo(ranked, beta=0.5)  # -log σ(1) times (√2 - 1)(1 - 1/log₂ 3)
        tensor([0.0479])

    References:
        Liu et al., LiPO: Listwise Preference Optimization through Learning-to-Rank, 2024.
        https://arxiv.org/abs/2402.01878
    """
    score, rank, present = beta * ranked.logratio, ranked.rank, ranked.present
    better = rank[:, :, None] < rank[:, None, :]  # [prompts i j]: i is ranked above j
    better = better & present[:, None, :]  # an answer beats no padding
    gain = torch.exp2(better.sum(dim=2) / present.sum(dim=1, keepdim=True).clamp(min=1))
    lead = score[:, :, None] - score[:, None, :]
    first = torch.ones_like(better[0]).triu(1)  # equal score and equal rank: as listed
    before = (lead > 0) | ((lead == 0) & (better | ((rank[:, :, None] == rank[:, None, :]) & first)))
    place = 1 + (before & present[:, :, None]).sum(dim=1)
    discount = 1 / torch.log2(1 + place.to(score.dtype))
    # Made of counts and places, so weights have no gradient.
    weight = (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()
    return (weight * better * F.softplus(-lead)).sum(dim=(1, 2))  # eq. 8
