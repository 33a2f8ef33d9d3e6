"""Self-play preference optimisation with hard labels."""

from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def sppo(pair: PairLogps, *, beta: float = 0.001) -> Float[Tensor, " pairs"]:
    """SPPO: regress each log-ratio onto the answer's win rate, one step of a game that the policy plays with itself.

    Multiplicative weights in a constant-sum game lead to its Nash equilibrium, also where preferences run in circles.
    One step multiplies π by exp(η win rate); this is its square loss with win rates of 1 and 0 and η = 1/β.

    Formula:
        (log π_w / π_w^ref - 1/(2β))² + (log π_l / π_l^ref + 1/(2β))²  (eq. 4.7, P = 1 for winner and 0 for loser)

    Use it:
        In rounds: sample from the policy, judge, train, make the policy the next reference. It fixes each side's
        log-ratio, so the chosen likelihood cannot sink. Same scale as TRL's `sppo_hard`. The paper estimates soft win
        rates with a ranker; hard labels overstate them.

    Args:
        pair: log-probabilities of the four sides.
        beta: 1/η. The targets are ±1/(2β) nats: 500 at the paper's η = 1000, never reached in one round.

    Returns:
        Loss per pair, in nats squared.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> sppo(pair, beta=0.1)  # log-ratios ±1, targets ±5
        tensor([32.])

    References:
        Wu et al., Self-Play Preference Optimization for Language Model Alignment, 2024.
        https://arxiv.org/abs/2405.00675
    """
    target = 0.5 / beta
    return (pair.chosen_logratio - target) ** 2 + (pair.rejected_logratio + target) ** 2  # eq. 4.7
