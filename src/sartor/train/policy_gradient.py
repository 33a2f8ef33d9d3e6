"""What reinforcement learning computes on a rollout: KL, rewards per token, advantages, and the clipped losses.

Pure functions of tensors, shared by PPO, RLOO and GRPO; no model and no options in them. Completions of unlike length
stand flat, [N] tokens one after the other, as everywhere in Sartor; ``lengths`` says where each ends.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def k1(policy: Float[Tensor, "*n"], reference: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log π - log π_ref of sampled tokens: an unbiased estimate of KL(π ‖ π_ref) that can fall below 0 (Schulman 2020,
    http://joschu.net/blog/kl-approx.html)."""
    return policy - reference


def k3(policy: Float[Tensor, "*n"], reference: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """(r - 1) - log r with r = π_ref/π: unbiased too, never below 0, and of less variance (Schulman 2020)."""
    log_ratio = reference - policy
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(
    score: Float[Tensor, " S"], kl: Float[Tensor, " N"], lengths: Sequence[int], kl_coef: float
) -> Float[Tensor, " N"]:
    """-kl_coef·KL at every token, and the score on top at a completion's last one (Ouyang et al. 2022, equation 2)."""
    ends = torch.tensor([end - 1 for end in accumulate(lengths)], device=kl.device)
    return (-kl_coef * kl).index_add(0, ends, score)


def gae(
    rewards: Float[Tensor, " N"], values: Float[Tensor, " N"], lengths: Sequence[int], gamma: float, lam: float
) -> Float[Tensor, " N"]:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, equation 16).

    A_t = δ_t + γλ·A_{t+1} with δ_t = r_t + γ·V_{t+1} - V_t; after a completion's last token both are 0.

    >>> gae(torch.tensor([0.0, 1.0, 5.0]), torch.tensor([0.5, 0.5, 2.0]), lengths=[2, 1], gamma=1.0, lam=0.5)
    tensor([0.2500, 0.5000, 3.0000])
    """
    width = max(lengths)
    # One row a completion, its end on the right: all run backwards in step, and what lies before a start is 0.
    rows, places = zip(*((s, width - n + t) for s, n in enumerate(lengths) for t in range(n)), strict=True)
    at = torch.tensor(rows), torch.tensor(places)
    reward, value = rewards.new_zeros(len(lengths), width), values.new_zeros(len(lengths), width + 1)
    reward[at], value[at] = rewards, values
    advantage, following = torch.zeros_like(reward), rewards.new_zeros(len(lengths))
    for t in reversed(range(width)):
        delta = reward[:, t] + gamma * value[:, t + 1] - value[:, t]
        advantage[:, t] = following = delta + gamma * lam * following
    return advantage[at]


def leave_one_out(score: Float[Tensor, "prompts n"]) -> Float[Tensor, "prompts n"]:
    """Each score less the mean of the other answers' to its prompt (RLOO; Ahmadian et al. 2024, arXiv 2402.14740).

    >>> leave_one_out(torch.tensor([[1.0, 2.0, 6.0]]))
    tensor([[-3.0000, -1.5000,  4.5000]])
    """
    n = score.shape[1]
    return (score - score.mean(1, keepdim=True)) * n / (n - 1)


def group_normalised(score: Float[Tensor, "prompts n"]) -> Float[Tensor, "prompts n"]:
    """Each score less its prompt's mean, over its prompt's standard deviation (GRPO; Shao et al. 2024, arXiv
    2402.03300, section 4.1.2)."""
    return (score - score.mean(1, keepdim=True)) / (score.std(1, keepdim=True) + 1e-4)


def whiten(values: Float[Tensor, " N"], shift_mean: bool = True) -> Float[Tensor, " N"]:
    """Values of unit variance, and of mean 0 unless they are to keep theirs (Huang et al. 2024, arXiv 2403.17031)."""
    mean, variance = values.mean(), values.var(correction=0)
    white = (values - mean) * torch.rsqrt(variance + 1e-8)
    return white if shift_mean else white + mean


def clipped_policy_loss(
    logps: Float[Tensor, " N"], old: Float[Tensor, " N"], advantage: Float[Tensor, " N"], clip: float
) -> Float[Tensor, " N"]:
    """-min(ratio·A, clip(ratio)·A) per token (Schulman et al. 2017, arXiv 1707.06347, equation 7), ratio = π/π_old."""
    ratio = torch.exp(logps - old)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def clipped_value_loss(
    values: Float[Tensor, " N"], old: Float[Tensor, " N"], returns: Float[Tensor, " N"], clip: float
) -> Float[Tensor, " N"]:
    """Half the larger squared error of the value and of the value held within ``clip`` of the old one (Huang et al.
    2024, arXiv 2403.17031, section 7)."""
    held = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (held - returns).square())


def clipped_share(
    logps: Float[Tensor, " N"], old: Float[Tensor, " N"], advantage: Float[Tensor, " N"], clip: float
) -> Bool[Tensor, " N"]:
    """Where clipping stops the gradient: the ratio has left the range on the side that the advantage pulls to."""
    ratio = torch.exp(logps - old)
    return torch.where(advantage >= 0, ratio > 1 + clip, ratio < 1 - clip)


def per_token(lengths: Sequence[int], by: str) -> Float[Tensor, " N"]:
    """What each token's loss weighs, so that the sum over a batch is its mean.

    ``tokens``: every token alike (PPO); ``completions``: every completion as a whole, its tokens' losses summed (RLOO,
    Dr. GRPO); ``means``: every completion alike, its tokens' losses averaged (GRPO).

    >>> per_token([1, 3], "tokens"), per_token([1, 3], "means")
    (tensor([0.2500, 0.2500, 0.2500, 0.2500]), tensor([0.5000, 0.1667, 0.1667, 0.1667]))
    """
    total = {"tokens": sum(lengths), "completions": len(lengths), "means": len(lengths)}[by]
    weights = [1 / n if by == "means" else 1.0 for n in lengths for _ in range(n)]
    return torch.tensor(weights) / total


class KlController:
    """The KL coefficient: fixed, or steered to keep KL near a target (Ziegler et al. 2019, arXiv 1909.08593, §2.2).

    Without a target it never changes. ``gain`` is how much of the error, itself held within a fifth, goes into each
    update: theirs was 0.1, at some thousand updates; a run of some dozen rollouts needs to move faster.
    """

    def __init__(self, value: float, target: float | None = None, gain: float = 1.0) -> None:
        self.value, self.target, self.gain = value, target, gain

    def update(self, kl: float) -> None:
        """Take in the mean KL of a rollout, in nats per completion."""
        if self.target is not None:
            self.value *= 1 + self.gain * min(0.2, max(-0.2, kl / self.target - 1))
