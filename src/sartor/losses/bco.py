"""Binary classifier optimisation: the implicit reward as the logit of a classifier."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import JudgedLogps


def bco(judged: JudgedLogps, *, beta: float = 0.1) -> Float[Tensor, " completions"]:
    """Binary classifier optimisation: tells good answers from bad ones by their implicit reward.

    The cross-entropy of a classifier with logit β·log(π / π_ref) is an upper bound on the DPO loss of the pairs that
    one could have formed. Shifting the logit by δ, the middle between good and bad rewards, tightens the bound: else
    the loss pushes all good rewards above 0 and all bad ones below 0, wherever the policy stands.

    Formula:
        -log σ(r - δ) where the answer is good, -log σ(δ - r) where it is bad,
        r = β log(π(y|x) / π_ref(y|x)),  δ = ½ (mean of r over the good + mean of r over the bad)

    Use it:
        As an alternative to kto for single judged answers. Unlike kto it keeps pushing on answers that are far on
        the wrong side, so it learns faster from clean labels and suffers more from wrong ones.

    Args:
        judged: log-probabilities of judged answers. δ is over all completions given, that is, the whole optimizer
            batch, and detached. Where only one label is present, δ is that label's mean.
        beta: reward per nat of log-ratio.

    Returns:
        Loss per completion, in nats. The paper and older TRL keep δ as a running mean over steps; this function has
        no state, so use batches that hold several answers of each label. Their optional density-ratio weights, for
        bad answers that come from other prompts than the good ones, are left out.

    Examples:
        >>> two = torch.tensor([-10.0, -12.0])
        >>> judged = JudgedLogps(two, torch.tensor([-11.0, -11.0]), torch.tensor([True, False]), torch.tensor([5, 5]))
        >>> bco(judged, beta=1.0)  # rewards +1 (good) and -1 (bad), δ = 0: both -log σ(1)
        tensor([0.3133, 0.3133])

    References:
        Jung et al., Binary Classifier Optimization for Large Language Model Alignment, 2024.
        https://arxiv.org/abs/2404.04656
    """
    reward = beta * judged.logratio
    labels = torch.stack([judged.good, ~judged.good]).to(reward.dtype)
    counts = labels.sum(dim=1)
    means = (labels * reward).sum(dim=1) / counts.clamp(min=1)  # 0 for a label that is not there
    shift = (means.sum() / (counts > 0).sum().clamp(min=1)).detach()
    return -F.logsigmoid(torch.where(judged.good, reward - shift, shift - reward))
