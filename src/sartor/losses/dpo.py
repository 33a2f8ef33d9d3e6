"""Direct preference optimisation, and what follows from it when labels are wrong by a known share."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def dpo(pair: PairLogps, *, beta: float = 0.1) -> Float[Tensor, " pairs"]:
    """Direct preference optimisation: preferences fitted without a reward model.

    Every language model is the optimal policy of some reward r(x, y) = β log(π(y|x) / π_ref(y|x)) + const(x) (eq. 5).
    Put into the Bradley-Terry model, the constant cancels and preferences can be fitted directly.

    Formula:
        -log σ(β [(log π_w - log π_w^ref) - (log π_l - log π_l^ref)])  (eq. 7)

    Use it:
        First. It is the yardstick that every other objective here is measured against.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the KL leash: 1/β is how many nats of log-ratio one unit of reward is worth. Higher stays
            closer to the reference.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> dpo(pair, beta=0.5)  # log-ratios +1 and -1: -log σ(0.5 · 2)
        tensor([0.3133])

    References:
        Rafailov et al., Direct Preference Optimization: Your Language Model is Secretly a Reward Model, 2023.
        https://arxiv.org/abs/2305.18290
    """
    return -F.logsigmoid(beta * pair.margin)  # eq. 7
