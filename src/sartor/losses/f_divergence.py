"""DPO with another leash than the reverse KL: forward KL and Jensen-Shannon."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.losses.stable import tangent_expm1
from sartor.types import PairLogps


def dpo_forward_kl(pair: PairLogps, *, beta: float = 0.1) -> Float[Tensor, " pairs"]:
    """f-DPO with the forward KL: a leash that keeps the policy covering all that the reference does.

    Any f-divergence can hold the policy near the reference; the reward is then β f'(π / π^ref). For the forward KL,
    f(u) = -log u: a rise is worth at most β, a fall is punished without bound.

    Formula:
        -log σ(β f'(u_w) - β f'(u_l)),  u = π / π^ref,  f'(u) = -1/u

    Use it:
        When variety matters more than reward. Ratios of whole sequences make 1/u explode: beyond e²⁰ it goes on along
        its tangent here. TRL has the same f', without this guard.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the leash.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> dpo_forward_kl(pair, beta=0.5)  # f' = -1/e and -e
        tensor([0.2691])

    References:
        Wang et al., Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
        Constraints, 2023. https://arxiv.org/abs/2309.16240
    """
    return -F.logsigmoid(beta * (tangent_expm1(-pair.rejected_logratio) - tangent_expm1(-pair.chosen_logratio)))


def dpo_js(pair: PairLogps, *, beta: float = 0.1) -> Float[Tensor, " pairs"]:
    """f-DPO with the Jensen-Shannon divergence: between the reverse KL's mode seeking and the forward KL's covering.

    A rise in likelihood is worth at most β log 2, so most of the learning is in the rejected side.

    Formula:
        -log σ(β f'(u_w) - β f'(u_l)),  u = π / π^ref,  f'(u) = log(2u / (1 + u))

    Use it:
        As a middle way where DPO narrows the model too much. With u far above 1 on both sides its gradient vanishes.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the leash.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> dpo_js(pair, beta=0.5)  # f' = 0.3799 and -0.6201
        tensor([0.4741])

    References:
        Wang et al., as for ``dpo_forward_kl``. https://arxiv.org/abs/2309.16240
    """
    # log(2u / (1 + u)) = log 2 + log σ(log u); the constant cancels.
    return -F.logsigmoid(beta * (F.logsigmoid(pair.chosen_logratio) - F.logsigmoid(pair.rejected_logratio)))
