"""Anchored preference optimisation without pairs: KTO with its reference point held at zero."""

import torch
from jaxtyping import Float
from torch import Tensor

from sartor.types import JudgedLogps


def apo_zero_unpaired(
    judged: JudgedLogps, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Float[Tensor, " completions"]:
    """Anchored preference optimisation, unpaired: good answers become likelier, bad answers less likely.

    APO-zero says for each side of a pair in which direction its likelihood shall move, where DPO fixes only the
    difference. No term needs the other side, so the loss works without pairs. It is KTO with z = 0, which saves
    KTO's extra forward pass over mismatched completions.

    Formula:
        λ_good (1 - σ(r)) where the answer is good, λ_bad σ(r) where it is bad,
        r = β (log π(y|x) - log π_ref(y|x))  (L_zero of the paper, its two terms taken apart)

    Use it:
        When good answers are better than what the model writes by itself. Where they are worse, raising their
        likelihood does harm. Prefer kto if the policy is to move far from the reference: its z moves along.

    Args:
        judged: log-probabilities of judged answers.
        beta: reward per nat of log-ratio.
        desirable_weight: λ for good answers, to balance unequal counts.
        undesirable_weight: λ for bad answers.

    Returns:
        Loss per completion, between 0 and its weight; equal to the KTO trainer's ``apo_zero_unpaired`` in TRL 1.16.

    Examples:
        >>> two = torch.tensor([-10.0, -12.0])
        >>> judged = JudgedLogps(two, torch.tensor([-11.0, -11.0]), torch.tensor([True, False]), torch.tensor([5, 5]))
        >>> apo_zero_unpaired(judged, beta=1.0)  # log-ratios +1 (good) and -1 (bad)
        tensor([0.2689, 0.2689])

    References:
        D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions: Addressing
        Underspecification in Alignment, 2024. https://arxiv.org/abs/2408.06266
    """
    reward = beta * judged.logratio
    weight = torch.where(judged.good, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(torch.where(judged.good, -reward, reward))  # 1 - σ(r) = σ(-r)
