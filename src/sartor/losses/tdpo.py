"""Token-level DPO: the drift from the reference, counted at every token."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def tdpo1(pair: PairLogps, *, beta: float = 0.1) -> Float[Tensor, " pairs"]:
    """Token-level DPO, first form: DPO plus the difference of the two sides' per-token divergences.

    DPO holds the policy to the reference only through the log-probs of the two answers. Stated token by token, the
    Bradley-Terry model gains a term: how far the whole next-token distribution has moved along each answer.

    Formula:
        -log σ(β [ρ - (K_l - K_w)]),  ρ the DPO margin,  K = Σ_t KL(π_ref(·|x, y_<t) ‖ π(·|x, y_<t))

    Use it:
        As the plain form behind tdpo2, which the paper finds better: here the gradient also raises the divergence
        on the chosen side.

    Args:
        pair: log-probabilities of the four sides, with ``chosen_kl`` and ``rejected_kl`` (K_w, K_l).
        beta: strength of the KL leash, as in dpo.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> side = (torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0))
        >>> kl = dict(chosen_kl=torch.tensor([1.0]), rejected_kl=torch.tensor([2.0]))
        >>> tdpo1(PairLogps(*side, *[torch.tensor([5])] * 2, **kl), beta=1.0)  # -log σ(2 - (2 - 1))
        tensor([0.3133])

    References:
        Zeng et al., Token-level Direct Preference Optimization, 2024. https://arxiv.org/abs/2404.11999
    """
    return -F.logsigmoid(beta * (pair.margin - (pair.rejected_kl - pair.chosen_kl)))


def tdpo2(pair: PairLogps, *, beta: float = 0.1, alpha: float = 0.5) -> Float[Tensor, " pairs"]:
    """Token-level DPO, second form: DPO that also keeps the rejected side near the reference.

    The chosen side's divergence is a constant here (no gradient), so only the rejected side's is pressed down.

    Formula:
        -log σ(β [ρ - α (K_l - sg(K_w))]),  sg: no gradient,  ρ and K as in tdpo1

    Use it:
        When DPO drifts far or loses diversity. It needs the next-token distributions of both models at every
        position, so cached log-probs of the reference are not enough.

    Args:
        pair: as in tdpo1.
        beta: strength of the KL leash, as in dpo.
        alpha: weight of the divergence term; 0 is dpo.

    Returns:
        Loss per pair, in nats; the gradient differs from tdpo1's even at alpha = 1.

    Examples:
        >>> import torch
        >>> side = (torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0))
        >>> kl = dict(chosen_kl=torch.tensor([1.0]), rejected_kl=torch.tensor([3.0]))
        >>> tdpo2(PairLogps(*side, *[torch.tensor([5])] * 2, **kl), beta=1.0)  # -log σ(2 - ½ (3 - 1))
        tensor([0.3133])

    References:
        Zeng et al., Token-level Direct Preference Optimization, 2024. https://arxiv.org/abs/2404.11999
    """
    return -F.logsigmoid(beta * (pair.margin - alpha * (pair.rejected_kl - pair.chosen_kl.detach())))
