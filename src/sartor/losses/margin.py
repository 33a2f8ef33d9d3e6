"""DPO with a margin that grows with the strength of the preference."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def dpo_margin(pair: PairLogps, *, beta: float = 0.1, alpha: float = 1.0, log: bool = False) -> Float[Tensor, " pairs"]:
    """DPO with an offset (ODPO): the stronger people preferred an answer, the wider the margin asked of the model.

    A slight preference and a strong one are the same pair to DPO. The offset is a threshold that the difference of
    rewards has to clear. Llama 2's reward model uses a margin in this way.

    Formula:
        -log σ(β ρ - Δ),  Δ = α·strength, or α log(strength),  ρ = log π_w / π_w^ref - log π_l / π_l^ref

    Use it:
        When strengths mean something, as with graded ratings. Linear is Llama 2's margin and safe for any scale from 0
        up; ``log`` is ODPO's choice, where strengths below 1 relax the margin instead. Without strengths it is DPO.

    Args:
        pair: log-probabilities of the four sides; no offset where ``strength`` is NaN.
        beta: strength of the KL leash, as in DPO.
        alpha: α, scale of the offset, in units of reward; 0 is DPO.
        log: take α log(strength), with strengths of 0 or less as 1e-6.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> dpo_margin(pair, beta=0.5)  # no strength: as DPO
        tensor([0.3133])

    References:
        Amini, Vieira, Cotterell, Direct Preference Optimization with an Offset, 2024. https://arxiv.org/abs/2402.10571
        Touvron et al., Llama 2: Open Foundation and Fine-Tuned Chat Models, 2023. https://arxiv.org/abs/2307.09288
    """
    offset = alpha * (pair.strength.clamp(min=1e-6).log() if log else pair.strength)
    return -F.logsigmoid(beta * pair.margin - torch.nan_to_num(offset, nan=0.0))
