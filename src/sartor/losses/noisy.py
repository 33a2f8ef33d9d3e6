"""DPO when a known share of the preference labels is flipped: hedge (cDPO), or undo the bias (robust DPO)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def cdpo(pair: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Float[Tensor, " pairs"]:
    """Conservative DPO: label smoothing, for preferences that are sometimes wrong.

    If a share ε of labels is flipped, the right target is a chance of 1 - ε, not certainty. The loss has its minimum
    at a finite margin, log((1 - ε) / ε) / β, so it also stops the margin from growing for ever.

    Formula:
        -(1 - ε) log σ(β ρ) - ε log σ(-β ρ),  ρ = log π_w / π_w^ref - log π_l / π_l^ref  (eq. 3)

    Use it:
        When labels are noisy, or when DPO's margins run away. On clean labels it learns less from each pair.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the KL leash, as in DPO.
        label_smoothing: ε, the share of labels thought to be flipped, below 1/2; 0 is DPO.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> cdpo(pair, beta=0.5)  # β ρ = 1: 0.9 · 0.3133 + 0.1 · 1.3133
        tensor([0.4133])

    References:
        Mitchell, A note on DPO with noisy preferences and relationship to IPO, 2023.
        https://ericmitchell.ai/cdpo.pdf
    """
    logit = beta * pair.margin
    return -(1 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)  # eq. 3


def robust(pair: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Float[Tensor, " pairs"]:
    """Robust DPO: an unbiased estimate, from noisy labels, of the DPO loss on clean ones.

    If labels flip with chance ε, this weighting of the loss with the label as given and as flipped has the clean loss
    as its mean. The price is variance, and a loss without lower bound: it goes on falling as the margin grows.

    Formula:
        [(1 - ε) L(w, l) - ε L(l, w)] / (1 - 2ε),  L = DPO's loss

    Use it:
        When flips are random and their share is known. If it is a guess, cDPO forgives more.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the KL leash, as in DPO.
        label_smoothing: ε, the chance that a label is flipped, below 1/2; 0 is DPO.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> robust(pair, beta=0.5)  # (0.9 · 0.3133 - 0.1 · 1.3133) / 0.8
        tensor([0.1883])

    References:
        Chowdhury, Kini, Natarajan, Provably Robust DPO: Aligning Language Models with Noisy Feedback, 2024.
        https://arxiv.org/abs/2403.00409
    """
    logit = beta * pair.margin
    kept, flipped = -F.logsigmoid(logit), -F.logsigmoid(-logit)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)
