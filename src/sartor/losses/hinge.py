"""The hinge on DPO's margin: pairs that are right by enough no longer count."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def hinge(pair: PairLogps, *, beta: float = 0.1) -> Float[Tensor, " pairs"]:
    """Hinge loss on the DPO margin, as in support vector machines: no gradient once a pair is right by 1/β nats.

    DPO's logistic loss pulls on every pair for ever, if ever more weakly. The hinge pulls at full strength until the
    margin is reached and then lets go. SLiC-HF brought it to preferences; RSO puts the reference into the margin.

    Formula:
        max(0, 1 - β ρ),  ρ = log π_w / π_w^ref - log π_l / π_l^ref  (RSO's hinge-norm, with its γ as β)

    Use it:
        When easy pairs should stop moving the model. Its gradient does not tell a slight error from a gross one. SLiC's
        regulariser towards the SFT targets is not part of it: mix in ``sft`` for that.

    Args:
        pair: log-probabilities of the four sides.
        beta: reciprocal of the margin, in nats, at which a pair stops counting.

    Returns:
        Loss per pair, without unit.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> hinge(pair, beta=0.25)  # 1 - 0.25 · 2
        tensor([0.5000])

    References:
        Zhao et al., SLiC-HF: Sequence Likelihood Calibration with Human Feedback, 2023.
        https://arxiv.org/abs/2305.10425
        Liu et al., Statistical Rejection Sampling Improves Preference Optimization, 2023.
        https://arxiv.org/abs/2309.06657
    """
    return F.relu(1 - beta * pair.margin)
