"""Identity preference optimisation: regress the margin onto a constant instead of pushing it without end."""

from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def ipo(pair: PairLogps, *, beta: float = 0.1) -> Float[Tensor, " pairs"]:
    """IPO, per token: a squared loss that stops at a target margin, for pairs labelled with near certainty.

    Where one answer always wins, DPO's best margin is infinite and its KL leash has no effect. A square around a target
    keeps the leash. This form divides each log-ratio by its completion's length, so that one target suits all lengths.

    Formula:
        (h - 1/(2τ))²,  h = (log π_w / π_w^ref) / |y_w| - (log π_l / π_l^ref) / |y_l|  (eq. 17, per token)

    Use it:
        When DPO overfits a small or one-sided set. The paper prints sums (``ipo_sum``); its authors told TRL that their
        results are from this form, and TRL's `ipo` is this one.

    Args:
        pair: log-probabilities of the four sides.
        beta: τ in the paper. The target margin is 1/(2τ) nats a token: higher stays closer to the reference.

    Returns:
        Loss per pair, in nats a token, squared.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> ipo(pair, beta=0.5)  # h = 0.2 - (-0.2), the target is 1
        tensor([0.3600])

    References:
        Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, 2023.
        https://arxiv.org/abs/2310.12036
    """
    chosen = pair.chosen_logratio / pair.chosen_length.clamp(min=1)
    rejected = pair.rejected_logratio / pair.rejected_length.clamp(min=1)
    return (chosen - rejected - 1 / (2 * beta)) ** 2  # eq. 17, per token


def ipo_sum(pair: PairLogps, *, beta: float = 0.1) -> Float[Tensor, " pairs"]:
    """IPO as printed in the paper: the log-ratios summed over tokens.

    The target is a margin of whole sequences, the same for ten tokens as for a thousand.

    Formula:
        (ρ - 1/(2τ))²,  ρ = log π_w / π_w^ref - log π_l / π_l^ref  (eq. 17)

    Use it:
        To follow the paper's text, or where completions are all of about one length. Otherwise ``ipo``.

    Args:
        pair: log-probabilities of the four sides.
        beta: τ in the paper. The target margin is 1/(2τ) nats.

    Returns:
        Loss per pair, in nats squared.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> ipo_sum(pair, beta=0.5)  # ρ = 2, the target is 1
        tensor([1.])

    References:
        Azar et al., as for ``ipo``. https://arxiv.org/abs/2310.12036
    """
    return (pair.margin - 1 / (2 * beta)) ** 2  # eq. 17
