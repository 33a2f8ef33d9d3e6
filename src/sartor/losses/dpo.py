"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def dpo(pair: PairLogps, *, beta: float = 0.1) -> Float[Tensor, " pairs"]:
    """The DPO loss of each pair, in nats.

    Every language model is the optimal policy of some reward r(x, y) = β log(π(y|x) / π_ref(y|x)) + const(x) (eq. 5).
    Put into the Bradley-Terry model, the constant cancels and preferences can be fitted directly:
    ``-log σ(β [(log π_w - log π_w^ref) - (log π_l - log π_l^ref)])`` (eq. 7).

    Args:
        pair: log-probabilities of the four sides, each with shape [pairs].
        beta: strength of the KL leash: 1/β is how many nats of log-ratio one unit of reward is worth. Higher stays
            closer to the reference.

    Returns:
        Loss per pair, shape [pairs].

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> dpo(pair, beta=0.5)  # log-ratios +1 and -1: -log σ(0.5 · 2)
        tensor([0.3133])

    References:
        Rafailov et al., Direct Preference Optimization: Your Language Model is Secretly a Reward Model, 2023.
        https://arxiv.org/abs/2305.18290
    """
    chosen_logratio = pair.policy_chosen - pair.reference_chosen
    rejected_logratio = pair.policy_rejected - pair.reference_rejected
    return -F.logsigmoid(beta * (chosen_logratio - rejected_logratio))  # eq. 7
