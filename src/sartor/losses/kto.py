"""Kahneman-Tversky optimisation: answers that are good or bad, with no pairs."""

import torch
from jaxtyping import Float
from torch import Tensor

from sartor.types import JudgedLogps


def kto(
    judged: JudgedLogps, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Float[Tensor, " completions"]:
    """Kahneman-Tversky optimisation: learns from thumbs up and thumbs down, one answer at a time.

    In prospect theory people judge an outcome against a reference point and care less about each further gain. Here
    the outcome is an answer's reward β·log(π / π_ref), the reference point is how far the policy has moved in all
    (its KL divergence from the reference), and the sigmoid is the value that saturates on both sides.

    Formula:
        λ_good (1 - σ(β (r - z)))  where the answer is good,
        λ_bad (1 - σ(β (z - r)))  where it is bad  (section 4.1),
        r = log π(y|x) - log π_ref(y|x),  z = max(0, mean over mismatched (x, y') of log π(y'|x) - log π_ref(y'|x))

    Use it:
        When feedback is single answers marked good or bad, above all when one label is rare. Where you have real
        pairs, start with dpo. It also ignores answers that it finds hopeless: the sigmoid is flat there.

    Args:
        judged: log-probabilities of judged answers. z is the mean over all mismatched completions given, that is,
            over the whole optimizer batch. It is detached, as in the paper, and 0 where there are none.
        beta: how fast value saturates, per nat of log-ratio.
        desirable_weight: λ for good answers. TRL advises λ_good·n_good / (λ_bad·n_bad) between 1 and 4/3.
        undesirable_weight: λ for bad answers.

    Returns:
        Loss per completion, between 0 and its weight. TRL 1.16's loss type ``kto`` is the same, but averages z over
        the micro-batch of each process.

    Examples:
        >>> two = torch.tensor([-10.0, -12.0])
        >>> judged = JudgedLogps(two, torch.tensor([-11.0, -11.0]), torch.tensor([True, False]), torch.tensor([5, 5]))
        >>> kto(judged, beta=1.0)  # log-ratios +1 (good) and -1 (bad), z = 0: both 1 - σ(1)
        tensor([0.2689, 0.2689])

    References:
        Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, 2024.
        https://arxiv.org/abs/2402.01306
    """
    mismatched = (judged.mismatched_policy - judged.mismatched_reference).detach()
    z = (mismatched.sum() / max(mismatched.numel(), 1)).clamp(min=0)  # an empty mean would be NaN
    gain = torch.where(judged.good, judged.logratio - z, z - judged.logratio)
    weight = torch.where(judged.good, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-beta * gain)  # 1 - σ(x) = σ(-x), without the cancellation
