"""What the trainer may put around any pairwise loss: weights per pair, and token sums that ignore length."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def wpo_weights(
    chosen_certainty: Float[Tensor, " pairs"], rejected_certainty: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """Weighted preference optimisation: pairs that the policy could have written itself count more.

    Data written by another model is off-policy. Weighting a pair by the probability of its answers makes it behave
    like data sampled from the policy. Raw sequence probabilities vanish with length, so the weight is a mean over
    tokens, relative to what sampling from the policy would give on average (Σ_v π(v)²).

    Formula:
        w(y) = exp(1/|y| Σ_t log(π(y_t) / Σ_v π(v)²)),  weight = w(y_w) w(y_l)  (eq. 2, sampled alignment)

    Use it:
        With preferences collected from other models. On answers sampled from the policy all weights are near 1 and
        nothing is gained.

    Args:
        chosen_certainty: mean over the chosen answer's tokens of log π(y_t) - log Σ_v π(v)².
        rejected_certainty: the same of the rejected answer.

    Returns:
        Weight per pair, detached; the trainer multiplies losses with it. Not clamped, like TRL 1.16; older TRL
        clamped it at 1.

    Examples:
        >>> wpo_weights(torch.tensor([-1.0]), torch.tensor([0.0]))
        tensor([0.3679])

    References:
        Zhou et al., WPO: Enhancing RLHF with Weighted Preference Optimization, 2024.
        https://arxiv.org/abs/2406.11827
    """
    return torch.exp(chosen_certainty + rejected_certainty).detach()  # eq. 2


def desensitised(
    token_logps: Float[Tensor, "sides tokens"], shared_length: Int[Tensor, " sides"], alpha: float = 0.5
) -> Float[Tensor, " sides"]:
    """Length desensitisation (LD-DPO): tokens beyond the shorter answer's length count less.

    A longer answer has more tokens to move, so DPO gains more from it whatever it says. Both answers of a pair keep
    full weight up to the length they share; the rest of the longer one is multiplied by α.

    Formula:
        Σ_{t ≤ l} log π(y_t) + α Σ_{t > l} log π(y_t),  l = min(|y_w|, |y_l|)

    Use it:
        When trained answers grow too long. Use the same sum for policy and reference.

    Args:
        token_logps: log-probability of each token of each side, in nats, 0 where there is no token.
        shared_length: l of each side's pair.
        alpha: weight of the excess: 1 is the plain sum, 0 ignores it.

    Returns:
        Log-probability per side, in nats, to be used in place of the plain sum.

    Examples:
        >>> desensitised(torch.tensor([[-1.0, -1.0, -4.0]]), torch.tensor([2]), alpha=0.5)
        tensor([-4.])

    References:
        Liu et al., Length Desensitization in Direct Preference Optimization, 2024. https://arxiv.org/abs/2409.06411
    """
    place = torch.arange(token_logps.shape[1], device=token_logps.device)
    return (token_logps * torch.where(place < shared_length[:, None], 1.0, alpha)).sum(dim=1)
