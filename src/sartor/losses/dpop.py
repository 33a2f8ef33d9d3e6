"""DPO-Positive: DPO that may not pay with the chosen answer's likelihood."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def dpop(pair: PairLogps, *, beta: float = 0.3, penalty: float = 50.0) -> Float[Tensor, " pairs"]:
    """DPO-Positive (Smaug): a fine while the chosen answer is less likely than under the reference.

    Two answers that differ in a few tokens share all the others. DPO may then widen the margin while it lowers both.
    The fine makes the margin count only once the chosen answer is at least as likely as before.

    Formula:
        -log σ(β [ρ - λ max(0, log π_w^ref / π_w)]),  ρ = log π_w / π_w^ref - log π_l / π_l^ref

    Use it:
        On pairs that are nearly alike, as in arithmetic or edits. With λ = 50, one nat lost outweighs 50 of margin, so
        elsewhere it behaves much like imitation of the chosen answer.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the KL leash, as in DPO; Smaug uses 0.3.
        penalty: λ, the fine per nat; Smaug uses 50. At 0 this is DPO.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> dpop(pair, beta=0.5)  # the chosen answer rose: as DPO
        tensor([0.3133])

    References:
        Pal et al., Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive, 2024.
        https://arxiv.org/abs/2402.13228
    """
    fall = F.relu(-pair.chosen_logratio)
    return -F.logsigmoid(beta * (pair.margin - penalty * fall))
