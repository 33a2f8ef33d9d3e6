"""PFL: hinge where the policy orders a pair wrongly, logistic where it orders it rightly."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def pfl(pair: PairLogps, *, beta: float = 0.05, tau: float = 0.05, variant: str = "paper") -> Float[Tensor, " pairs"]:
    """Policy focused loss: four times the weight on pairs that the policy itself orders wrongly.

    Right and wrong are told by the policy's own log-probs, not by the margin to the reference. They depend on length,
    so a short chosen answer counts as ordered rightly almost always.

    Formula:
        0.5 L(x) where log π_w > log π_l, else 2 H(x)  (eq. 29)
        paper: x = z/τ,  found: x = ρ,  released: x = z

    Use it:
        To study it (MT-Bench 7.900 in the search). Its held-out results were the worst of the seven, and the
        released form did not learn on IMDb at any beta.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the KL leash; ``found`` has none.
        tau: the scale of margins, read by ``paper`` only, which is ``found`` at beta = tau.
        variant: which of the three. Table 1 of the paper shows the released form.

    Returns:
        Loss per pair.

    Examples:
        >>> policy = torch.tensor([1.0, -1.0]), torch.zeros(2)
        >>> pfl(PairLogps(*policy, torch.zeros(2), torch.zeros(2), *[torch.tensor([5, 5])] * 2))  # x = 1 and -1
        tensor([0.1566, 4.0000])

    References:
        Lu et al., Discovering Preference Optimization Algorithms with and for Large Language Models, 2024,
        appendix E.7. https://arxiv.org/abs/2406.08414
    """
    scales = {"found": 1.0, "paper": beta / tau, "released": beta}
    if variant not in scales:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(scales)}")
    x = scales[variant] * pair.margin
    return torch.where(pair.policy_chosen > pair.policy_rejected, 0.5 * F.softplus(-x), 2 * F.relu(1 - x))  # eq. 29
