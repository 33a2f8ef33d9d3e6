"""Contrastive preference optimisation: DPO without a reference, beside imitation of the chosen answer."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sartor.types import PairLogps


def cpo(pair: PairLogps, *, beta: float = 0.1, nll_weight: float = 1.0) -> Float[Tensor, " pairs"]:
    """CPO: DPO without a reference model, held in place by imitating the chosen answer.

    With a uniform reference, DPO's margin is that of the policy alone: half the memory and time. Something must then
    keep the policy near good text, and the likelihood of the chosen answer does.

    Formula:
        -log σ(β [log π_w - log π_l]) - λ (log π_w) / |y_w|  (preference term: eq. 3)

    Use it:
        When a reference model does not fit, and chosen answers are good enough to imitate. The margin is a sum over
        tokens, so a difference in length enters it. In a ranking every answer that beats another is imitated.

    Args:
        pair: log-probabilities of both completions; the reference is not read.
        beta: reward per nat of log-probability.
        nll_weight: λ. The paper adds the answer's whole NLL; its code and TRL take the mean over tokens, and so does
            this, for each answer by itself where TRL pools the batch's tokens.

    Returns:
        Loss per pair, in nats.

    Examples:
        >>> import torch
        >>> pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), *[torch.tensor([5])] * 2)
        >>> cpo(pair, beta=0.5)  # 0.3133 + 10 / 5
        tensor([2.3133])

    References:
        Xu et al., Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
        Translation, 2024. https://arxiv.org/abs/2401.08417
    """
    nll = -pair.policy_chosen / pair.chosen_length.clamp(min=1)
    return -F.logsigmoid(beta * (pair.policy_chosen - pair.policy_rejected)) + nll_weight * nll  # eq. 3, and NLL
