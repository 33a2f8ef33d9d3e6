"""DPO leashed by an α-divergence, between reverse and forward KL."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.losses.stable import tangent_expm1
from sartor.types import PairLogps


def dpo_alpha(pair: PairLogps, *, beta: float = 0.1, alpha: float = 0.5) -> Float[Tensor, " pairs"]:
    """f-DPO with an α-divergence: one dial from DPO's mode seeking (α → 0) to the forward KL's covering (α → 1).

    The reward is β f'(π / π^ref). With larger α, a rise in likelihood is worth ever less (at most β/α) and a fall costs
    ever more, so the policy keeps more of the reference's variety.

    Formula:
        -log σ(β f'(u_w) - β f'(u_l)),  u = π / π^ref,  f'(u) = (1 - u^-α) / α

    Use it:
        To trade reward against variety. u is a ratio of whole sequences, so on long answers keep α small: beyond e²⁰,
        u^-α goes on along its tangent here. TRL writes its coefficient as 1 - α.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the leash.
        alpha: α, from 0 (DPO) to 1 (forward KL).

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> dpo_alpha(pair, beta=0.5)  # f' = 0.7869 and -1.2974
        tensor([0.3021])

    References:
        Wang et al., Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
        Constraints, 2023. https://arxiv.org/abs/2309.16240
    """
    if alpha == 0:  # the limit of f' is log u
        return -F.logsigmoid(beta * pair.margin)
    score = (tangent_expm1(-alpha * pair.rejected_logratio) - tangent_expm1(-alpha * pair.chosen_logratio)) / alpha
    return -F.logsigmoid(beta * score)
