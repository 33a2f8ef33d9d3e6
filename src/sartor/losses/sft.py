"""Supervised fine-tuning on the chosen answers, to be mixed with other objectives."""

from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def sft(pair: PairLogps) -> Float[Tensor, " pairs"]:
    """Imitation of the chosen answer: mixed into another objective, it keeps the chosen likelihood from sinking.

    Preference losses fix differences. A share of plain likelihood fixes the level as well. RPO derives such a
    term as a guard against over-optimisation; iterative reasoning preference optimisation uses it per token.

    Formula:
        -(log π_w) / |y_w|

    Use it:
        Beside DPO, where chosen answers are worth imitating. Alone it learns nothing from the rejected side. Each
        answer counts alike, whatever its length; TRL's `sft` pools the batch's tokens. In a ranking it imitates every
        answer that beats another, once for each that it beats.

    Args:
        pair: log-probabilities of both completions; the reference is not read.

    Returns:
        Loss per pair, in nats a token.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> sft(pair)  # 10 nats, 5 tokens
        tensor([2.])

    References:
        Pang et al., Iterative Reasoning Preference Optimization, 2024. https://arxiv.org/abs/2404.19733
        Liu et al., Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial
        Regularizer, 2024. https://arxiv.org/abs/2405.16436
    """
    return -pair.policy_chosen / pair.chosen_length.clamp(min=1)
