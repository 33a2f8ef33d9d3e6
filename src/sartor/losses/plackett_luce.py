"""The Plackett-Luce model of a ranking: DPO for lists."""

import torch
from jaxtyping import Float
from torch import Tensor

from sartor.types import RankedLogps


def plackett_luce(ranked: RankedLogps, *, beta: float = 0.1) -> Float[Tensor, " prompts"]:
    """Plackett-Luce: direct preference optimisation on a whole ranking at once.

    A ranking is read as a series of choices: the best of all answers, then the best of the rest, and so on. Each
    choice is a softmax over implicit rewards β·log(π / π_ref). Pairs cut from one ranking are not independent
    evidence; the ranking counts once here.

    Formula:
        -Σ_k log(exp(s_k) / Σ_{j not placed before k} exp(s_j)),  s = β (log π - log π_ref)  (appendix A.3)

    Use it:
        When a prompt has three or more ranked answers. With two it is dpo. With many answers of uneven quality the
        last places, often the least reliable, weigh as much as the first: see best_against_rest and lipo.

    Args:
        ranked: log-probabilities of K answers per prompt. Each member of a tied group competes with all members of
            its own group and of lower places (Breslow's form), so a tie pulls its members together. Without ties
            this is exactly Plackett-Luce. For a model of ties see plackett_luce_ties.
        beta: strength of the KL leash, as in dpo.

    Returns:
        Loss per prompt, in nats, summed over places; 0 where there is only one answer.

    Examples:
        >>> policy, rank = torch.tensor([[-9.0, -10.0, -11.0]]), torch.tensor([[1.0, 2.0, 3.0]])
        >>> ranked = RankedLogps(policy, torch.full((1, 3), -10.0), rank, torch.full((1, 3), 5))
        >>> plackett_luce(ranked, beta=1.0)  # scores 1, 0, -1: log(1 + e⁻¹ + e⁻²) + log(1 + e⁻¹)
        tensor([0.7209])

    References:
        Rafailov et al., Direct Preference Optimization: Your Language Model is Secretly a Reward Model, 2023,
        appendix A.3. https://arxiv.org/abs/2305.18290
    """
    score = beta * ranked.logratio
    lead = score[:, None, :] - score[:, :, None]  # [prompts i j]: s_j - s_i; differences keep fp32's precision
    rival = ranked.present[:, None, :] & (ranked.rank[:, None, :] >= ranked.rank[:, :, None])
    rival = rival | torch.eye(score.shape[1], dtype=torch.bool, device=score.device)  # padding meets only itself: 0
    return torch.logsumexp(lead.masked_fill(~rival, -torch.inf), dim=2).sum(dim=1)  # appendix A.3
