"""Simple preference optimisation: mean log-probability as the reward, and a margin to reach."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def simpo(pair: PairLogps, *, beta: float = 2.0, gamma: float = 1.0) -> Float[Tensor, " pairs"]:
    """SimPO: DPO without a reference, with the mean log-probability per token as the reward.

    Sampling picks answers by their likelihood, not by a ratio to a reference; training should then rank by likelihood.
    The mean over tokens takes out length, and the margin γ asks for more than a bare win.

    Formula:
        -log σ(β (log π_w) / |y_w| - β (log π_l) / |y_l| - γ)  (eq. 6)

    Use it:
        When a reference model does not fit, or DPO's answers get long. Nothing holds the policy near where it started
        but a small learning rate: it is sensitive to β, γ and that rate.

    Args:
        pair: log-probabilities of both completions; the reference is not read.
        beta: reward per nat of mean log-probability; 2 to 2.5 in the paper, up to 10 for some models.
        gamma: γ, the margin to reach, in units of reward. TRL's `simpo_gamma` is the same, with 0.5 as its default.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> simpo(pair)  # 2 · (-2 + 2.4) - 1 = -0.2
        tensor([0.7981])

    References:
        Meng, Xia, Chen, SimPO: Simple Preference Optimization with a Reference-Free Reward, 2024.
        https://arxiv.org/abs/2405.14734
    """
    chosen = pair.policy_chosen / pair.chosen_length.clamp(min=1)
    rejected = pair.policy_rejected / pair.rejected_length.clamp(min=1)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)  # eq. 6
