"""One good answer against several worse ones, with no order among the worse."""

import torch
from jaxtyping import Float
from torch import Tensor

from sartor.types import RankedLogps


def best_against_rest(ranked: RankedLogps, *, beta: float = 0.1) -> Float[Tensor, " prompts"]:
    """Softmax DPO: the best answer against all others at once.

    Best-of-K data names a winner and says nothing reliable about the rest. This is the first choice of
    Plackett-Luce alone: a softmax over implicit rewards in which the winner is the label. Its gradient goes mostly to
    the rivals that the policy now likes best, that is, to hard negatives.

    Formula:
        -log σ(-log Σ_l exp(s_l - s_w)) = log(1 + Σ_l exp(s_l - s_w)),  s = β (log π - log π_ref)

    Use it:
        When only the first place is to be trusted: a pick of one in K, or the top of a reward model's scores. With
        one rival it is dpo. Where lower places were ranked with care, plackett_luce learns more from them.

    Args:
        ranked: log-probabilities of K answers per prompt. Answers tied for first place are not each other's rivals;
            the loss is the mean over them.
        beta: strength of the KL leash, as in dpo.

    Returns:
        Loss per prompt, in nats; 0 where nothing is worse than the best.

    Examples:
        >>> policy, rank = torch.tensor([[-9.0, -10.0, -10.0]]), torch.tensor([[1.0, 2.0, 3.0]])
        >>> ranked = RankedLogps(policy, torch.full((1, 3), -10.0), rank, torch.full((1, 3), 5))
        >>> best_against_rest(ranked, beta=1.0)  # log(1 + 2 e⁻¹)
        tensor([0.5514])

    References:
        Chen et al., On Softmax Direct Preference Optimization for Recommendation, 2024.
        https://arxiv.org/abs/2406.09215
    """
    score = beta * ranked.logratio
    first = ranked.present & (ranked.rank == ranked.rank.amin(dim=1, keepdim=True))
    rival = (ranked.present & ~first)[:, None, :]
    lead = score[:, None, :] - score[:, :, None]  # [prompts w l]: s_l - s_w
    itself = torch.eye(score.shape[1], dtype=torch.bool, device=score.device)  # the 1 in log(1 + Σ)
    losses = torch.logsumexp(lead.masked_fill(~(rival | itself), -torch.inf), dim=2)
    return (losses * first).sum(dim=1) / first.sum(dim=1).clamp(min=1)
