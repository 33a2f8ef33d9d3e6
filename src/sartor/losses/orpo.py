"""Odds ratio preference optimisation: supervised fine-tuning that also learns what not to say."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.losses.stable import log1mexp
from sartor.types import PairLogps


def orpo(pair: PairLogps, *, weight: float = 0.1) -> Float[Tensor, " pairs"]:
    """ORPO: supervised fine-tuning and preferences in one stage, without a reference model.

    Imitating the chosen answer also lifts rejected ones that look like it. A small penalty on the odds ratio parts
    them. Odds, unlike probabilities, give a mild contrast, which leaves the imitation in charge.

    Formula:
        -(log π_w) / |y_w| - λ log σ(log odds_w - log odds_l),  odds = p / (1 - p),  p = π^(1/|y|)  (eq. 6 and 7)

    Use it:
        From a base model, in place of fine-tuning followed by DPO. TRL counts the prompt's tokens in the first term;
        this counts the completion's alone. In a ranking every answer that beats another is imitated.

    Args:
        pair: log-probabilities of both completions; the reference is not read.
        weight: λ, the weight of the odds ratio term (TRL calls it `beta`).

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> orpo(pair)  # p = e^-2 and e^-2.4
        tensor([2.0493])

    References:
        Hong, Lee, Thorne, ORPO: Monolithic Preference Optimization without Reference Model, 2024.
        https://arxiv.org/abs/2403.07691
    """
    chosen = pair.policy_chosen / pair.chosen_length.clamp(min=1)
    rejected = pair.policy_rejected / pair.rejected_length.clamp(min=1)
    log_odds_ratio = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -chosen - weight * F.logsigmoid(log_odds_ratio)  # eq. 6 and 7
