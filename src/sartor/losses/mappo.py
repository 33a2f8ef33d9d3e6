"""Maximum a posteriori preference optimisation: DPO with prior knowledge of how far apart two answers are."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def mappo(pair: PairLogps, *, beta: float = 0.1) -> Float[Tensor, " pairs"]:
    """MaPPO: DPO that pushes a rejected answer down only as far as it is known to be worse.

    DPO treats every loser as wrong, and where both answers are good it lowers the likelihood of both. A prior over the
    rewards, from a reward model or from annotators, weighs the rejected side by the gap Δ between the two.

    Formula:
        -log σ(β log π_w / π_w^ref - Δ β log π_l / π_l^ref),  Δ = r_w - r_l in [0, 1]

    Use it:
        When pairs come with scores of known scale, and many are close calls. Scale strengths to [0, 1]: beyond it they
        are clamped. Without strengths it is DPO.

    Args:
        pair: log-probabilities of the four sides; Δ is ``strength``, and 1 where nobody said.
        beta: strength of the KL leash, as in DPO.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> mappo(pair, beta=0.5)  # no strength: as DPO
        tensor([0.3133])

    References:
        Lan et al., MaPPO: Maximum a Posteriori Preference Optimization with Prior Knowledge, 2025.
        https://arxiv.org/abs/2507.21183
    """
    gap = torch.nan_to_num(pair.strength, nan=1.0).clamp(0.0, 1.0)
    return -F.logsigmoid(beta * (pair.chosen_logratio - gap * pair.rejected_logratio))
