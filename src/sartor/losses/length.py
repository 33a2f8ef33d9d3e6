"""DPO with length taken out: as a term beside the margin, or by dividing by it."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def r_dpo(pair: PairLogps, *, beta: float = 0.1, alpha: float = 0.01) -> Float[Tensor, " pairs"]:
    """R-DPO: DPO with a price on length, against answers that grow longer without growing better.

    If the reward that is maximised is r - α|y|, then r is β log π / π^ref + α|y|: where the chosen answer is longer,
    length explains part of the preference already, and the policy need not.

    Formula:
        -log σ(β ρ + α (|y_w| - |y_l|)),  ρ = log π_w / π_w^ref - log π_l / π_l^ref

    Use it:
        When DPO makes answers longer and nobody asked for it. It also takes away length that people did want.

    Args:
        pair: log-probabilities of the four sides.
        beta: strength of the KL leash, as in DPO.
        alpha: reward taken per token; at 0.01, 100 tokens more are worth one unit of reward. 0 is DPO.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> r_dpo(pair, beta=0.5)  # equal lengths: as DPO
        tensor([0.3133])

    References:
        Park et al., Disentangling Length from Quality in Direct Preference Optimization, 2024.
        https://arxiv.org/abs/2403.19159
    """
    longer = (pair.chosen_length - pair.rejected_length).to(pair.margin.dtype)
    return -F.logsigmoid(beta * pair.margin + alpha * longer)


def dpo_norm(pair: PairLogps, *, beta: float = 5.0) -> Float[Tensor, " pairs"]:
    """Length-normalised DPO: rewards are mean log-ratios per token, so that long answers weigh no more than short ones.

    A sum over tokens grows with length, and long pairs come to dominate. Tülu 3 divides each side by its own length and
    prefers it to plain DPO and to SimPO.

    Formula:
        -log σ(β [(log π_w / π_w^ref) / |y_w| - (log π_l / π_l^ref) / |y_l|])

    Use it:
        On answers of very unlike length. β is per token here and must be larger than DPO's, by about a mean length.
        Same values as TRL's `sigmoid_norm`.

    Args:
        pair: log-probabilities of the four sides.
        beta: reward per nat of mean log-ratio; 5 in Tülu 3.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> dpo_norm(pair)  # 5 · (0.2 + 0.2) = 2
        tensor([0.1269])

    References:
        Lambert et al., Tülu 3: Pushing Frontiers in Open Language Model Post-Training, 2024.
        https://arxiv.org/abs/2411.15124
    """
    chosen = pair.chosen_logratio / pair.chosen_length.clamp(min=1)
    return -F.logsigmoid(beta * (chosen - pair.rejected_logratio / pair.rejected_length.clamp(min=1)))
