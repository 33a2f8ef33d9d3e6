"""Binary classifier optimisation, on pairs."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def bco_pair(pair: PairLogps, *, beta: float = 0.1, shift: bool = True) -> Float[Tensor, " pairs"]:
    """BCO on pairs: a binary classifier whose logit is the implicit reward, chosen is 1 and rejected is 0.

    The classifier's cross-entropy bounds DPO's loss from above. The bound is tight only if rewards are centred, hence
    the shift δ: without it, a reward level common to both sides saturates one of the two terms.

    Formula:
        -log σ(r_w - δ) - log σ(-(r_l - δ)),  r = β log π / π^ref,  δ = ½ (mean r_w + mean r_l)

    Use it:
        On pairs whose two sides should be judged each by itself, or beside pointwise BCO. The shift is estimated from
        the batch, so small batches make it noisy.

    Args:
        pair: log-probabilities of the four sides.
        beta: reward per nat of log-ratio.
        shift: whether to subtract δ, a mean over the whole optimizer batch, detached (with one pair, over its two
            sides). TRL 1.16 has no shift: False gives its `bco_pair`.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> bco_pair(pair, beta=0.5)  # r_w = 0.5, r_l = -0.5, δ = 0
        tensor([0.9482])

    References:
        Jung et al., Binary Classifier Optimization for Large Language Model Alignment, 2024.
        https://arxiv.org/abs/2404.04656
    """
    chosen, rejected = beta * pair.chosen_logratio, beta * pair.rejected_logratio
    delta = 0.5 * (chosen.mean() + rejected.mean()).detach() if shift else torch.zeros_like(chosen)
    return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)
