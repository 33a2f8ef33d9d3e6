"""AlphaPO: SimPO with a reward of another shape than the logarithm."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.losses.stable import tangent_expm1
from sartor.types import PairLogps


def alphapo(pair: PairLogps, *, beta: float = 2.0, gamma: float = 1.0, alpha: float = 0.25) -> Float[Tensor, " pairs"]:
    """AlphaPO: SimPO with a reward whose shape can be bent, to control how far the chosen likelihood sinks.

    The logarithm is one of many rewards that f-divergences allow. With α > 0 the reward is steeper where an
    answer is unlikely and flatter where it is likely, which changes how far both sink on the way to the margin.

    Formula:
        -log σ(r_w - r_l - γ),  r = β (1 - p^-α) / α,  p = π^(1/|y|), the mean probability of a token

    Use it:
        In place of SimPO when the chosen answers lose much likelihood. It is one more number to tune. Beyond e²⁰, p^-α
        goes on along its tangent here; that takes a mean log-probability below -20/α.

    Args:
        pair: log-probabilities of both completions; the reference is not read.
        beta: scale of the reward, as in SimPO.
        gamma: γ, the margin to reach, in units of reward.
        alpha: α, the shape; 0 is SimPO. TRL's `alphapo` is the same form.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> alphapo(pair)  # log p = -2 and -2.4
        tensor([0.5182])

    References:
        Gupta et al., AlphaPO: Reward Shape Matters for LLM Alignment, 2025. https://arxiv.org/abs/2501.03884
    """
    chosen = pair.policy_chosen / pair.chosen_length.clamp(min=1)
    rejected = pair.policy_rejected / pair.rejected_length.clamp(min=1)
    if alpha != 0:  # at 0 the limit is log p itself
        chosen, rejected = -tangent_expm1(-alpha * chosen) / alpha, -tangent_expm1(-alpha * rejected) / alpha
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)
