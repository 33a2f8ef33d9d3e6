"""The Davidson-Luce model: rankings in which ties are outcomes of their own."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sartor.types import RankedLogps

_NEVER = -1e30  # stands for log 0: -inf would give NaN gradients in logaddexp


def plackett_luce_ties(
    ranked: RankedLogps, *, beta: float = 0.1, nu: float = 1.0, largest_tie: int = 0
) -> Float[Tensor, " prompts"]:
    """Davidson-Luce: a ranking with ties, where a tie says that answers are equally good.

    As in Plackett-Luce a ranking is a series of choices, but each choice may be a tied set C of the remaining answers
    S, with strength the geometric mean of its members' strengths α. An untied choice then also tells that the winner
    was clearly better, since a tie was possible.

    Formula:
        -Σ_stages log(δ_|C| g(C) / Σ_{T ⊆ S} δ_|T| g(T)),  g(T) = (Π_{i∈T} α_i)^(1/|T|),
        log α = β (log π - log π_ref),  δ_1 = 1,  δ_t = ν for t ≥ 2  (section 2)

    Use it:
        When annotators could say "equal" and did. With two answers it is Davidson's model of paired comparisons with
        ties. Where ties mean "did not look", use dpo: its pairs leave them out.

    Args:
        ranked: log-probabilities of K answers per prompt; equal ranks are ties. Cost grows with K⁴.
        beta: strength of the KL leash, as in dpo.
        nu: how common ties are, one δ for all sizes (the paper has one per size). For equal pairs
            P(tie) = ν / (2 + ν). 0 makes ties impossible, hence plackett_luce; it is kept at 1e-12 or more, so that
            a tie in the data costs a finite constant.
        largest_tie: largest set T in the normaliser, or a list's own largest tie if that is larger; 0: no limit.
            The paper takes the largest tie in the data.

    Returns:
        Loss per prompt, in nats, summed over stages; 0 where there is only one answer.

    Examples:
        >>> even = torch.full((1, 2), -10.0)
        >>> plackett_luce_ties(RankedLogps(even, even, torch.tensor([[1.0, 1.0]]), torch.tensor([[5, 5]])))
        tensor([1.0986])

    References:
        Firth, Kosmidis and Turner, Davidson-Luce model for multi-item choice with ties, 2019.
        https://arxiv.org/abs/1909.07123
    """
    score, answers = beta * ranked.logratio, ranked.rank.shape[1]
    itself = torch.eye(answers, dtype=torch.bool, device=score.device)  # padding meets only itself and costs 0
    together = ranked.present[:, :, None] & ranked.present[:, None, :]
    rest = (together & (ranked.rank[:, None, :] >= ranked.rank[:, :, None])) | itself  # [prompts stage answer]: S
    chosen = (together & (ranked.rank[:, None, :] == ranked.rank[:, :, None])) | itself  # C
    tied = chosen.sum(dim=2)
    middle = (score[:, None, :] * chosen).sum(dim=2) / tied  # log g(C): weights are relative to it
    log_alpha = (score[:, None, :] - middle[:, :, None]).masked_fill(~rest, _NEVER)
    size = torch.arange(1, answers + 1, device=score.device)
    # sums[..., t - 1, k]: log of the k-th elementary symmetric polynomial of α^(1/t); g needs k = t.
    sums = score.new_full((*score.shape, answers, answers + 1), _NEVER)
    sums[..., 0] = 0
    for root in (log_alpha[..., None] / size).unbind(dim=2):
        sums = torch.cat([sums[..., :1], torch.logaddexp(sums[..., 1:], sums[..., :-1] + root[..., None])], dim=-1)
    sums = sums[..., 1:].diagonal(dim1=-2, dim2=-1)
    log_nu = math.log(max(nu, 1e-12))
    limit = tied.amax(dim=1).clamp(min=largest_tie or answers)[:, None, None]
    stage = torch.logsumexp((sums + log_nu * (size > 1)).masked_fill(size > limit, _NEVER), dim=2)
    return ((stage - log_nu * (tied > 1)) / tied).sum(dim=1)  # each stage counts once, shared by its members
