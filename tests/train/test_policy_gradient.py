"""The parts of PPO, RLOO and GRPO against numbers worked out by hand, and all of them against a known optimum."""

import math

import pytest
import torch
from torch import Tensor

from sartor.train.policy_gradient import (
    KlController,
    clipped_policy_loss,
    clipped_share,
    clipped_value_loss,
    gae,
    group_normalised,
    k1,
    k3,
    leave_one_out,
    per_token,
    token_rewards,
    whiten,
)


def test_the_score_stands_at_the_last_token_and_kl_at_each() -> None:
    kl = torch.tensor([0.1, 0.2, -0.3, 0.5])
    found = token_rewards(torch.tensor([2.0, 7.0]), kl, [3, 1], kl_coef=0.5)
    assert found.tolist() == pytest.approx([-0.05, -0.1, 0.15 + 2.0, -0.25 + 7.0])


def test_advantages_of_completions_of_unlike_length() -> None:
    """γ = 0.9, λ = 0.8. First completion, rewards 1, 0, 2, values 0.5, 1, -1, backwards:
    δ₂ = 2 + 1 = 3; δ₁ = 0 - 0.9 - 1 = -1.9; δ₀ = 1 + 0.9 - 0.5 = 1.4;
    A₂ = 3; A₁ = -1.9 + 0.72·3 = 0.26; A₀ = 1.4 + 0.72·0.26 = 1.5872. Second, one token: 5 - 2 = 3."""
    rewards, values = torch.tensor([1.0, 0.0, 2.0, 5.0]), torch.tensor([0.5, 1.0, -1.0, 2.0])
    found = gae(rewards, values, [3, 1], gamma=0.9, lam=0.8)
    assert found.tolist() == pytest.approx([1.5872, 0.26, 3.0, 3.0])
    # The other order changes nothing: a short completion does not see what follows it in the batch.
    swapped = gae(rewards.roll(1), values.roll(1), [1, 3], gamma=0.9, lam=0.8)
    assert swapped.tolist() == pytest.approx([3.0, 1.5872, 0.26, 3.0])


def test_with_lambda_1_an_advantage_is_the_return_less_the_value() -> None:
    rewards, values = torch.randn(9), torch.randn(9)
    found = gae(rewards, values, [4, 5], gamma=1.0, lam=1.0)
    returns = [float(rewards[t:end].sum()) for start, end in ((0, 4), (4, 9)) for t in range(start, end)]
    torch.testing.assert_close(found + values, torch.tensor(returns))


def test_whitening() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3, variance 14/4
    scale = math.sqrt(3.5)
    assert whiten(values).tolist() == pytest.approx([-2 / scale, -1 / scale, 0, 3 / scale])
    assert whiten(values, shift_mean=False).tolist() == pytest.approx([x / scale + 3 for x in (-2, -1, 0, 3)])


def test_the_clipped_policy_loss_on_both_sides() -> None:
    ratio, advantage = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]), torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0])
    loss = clipped_policy_loss(ratio.log(), torch.zeros(5), advantage, clip=0.2)
    # A gain is counted up to the clip only, a loss in full.
    assert loss.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6, -2.2])
    assert clipped_share(ratio.log(), torch.zeros(5), advantage, 0.2).tolist() == [True, False, False, True, False]
    logps = ratio.log().requires_grad_()
    clipped_policy_loss(logps, torch.zeros(5), advantage, clip=0.2).sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0, -2.2])


def test_the_clipped_value_loss_takes_the_worse() -> None:
    values, old, returns = torch.tensor([2.0, 0.1]), torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0])
    # First: held at 1.2, error 1.8 against 1; second: within the range, error 0.9.
    assert clipped_value_loss(values, old, returns, 0.2).tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 0.9**2])


def test_both_estimates_of_kl_are_unbiased() -> None:
    """Σ π·k over a small distribution is KL(π ‖ π_ref) for both; k3 is never below 0."""
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = float((policy * (policy / reference).log()).sum())
    for estimate in (k1, k3):
        assert float((policy * estimate(policy.log(), reference.log())).sum()) == pytest.approx(exact, rel=1e-5)
    assert (k3(policy.log(), reference.log()) >= 0).all()
    assert (k1(policy.log(), reference.log()) < 0).any()


def test_groups() -> None:
    score = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    assert leave_one_out(score)[0].tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])
    std = math.sqrt((4 + 1 + 9) / 2)
    assert group_normalised(score)[0].tolist() == pytest.approx([-2 / std, -1 / std, 3 / std], rel=1e-3)
    assert group_normalised(score)[1].tolist() == [0.0, 0.0, 0.0]  # all alike: nothing to learn, and no division by 0


def test_weights_of_tokens() -> None:
    for by, want in {"tokens": [0.25] * 4, "completions": [0.5] * 4, "means": [0.5] + [1 / 6] * 3}.items():
        assert per_token([1, 3], by).tolist() == pytest.approx(want)


def test_the_kl_controller_pulls_towards_its_target() -> None:
    fixed, steered = KlController(0.1), KlController(0.1, target=6.0)
    for controller in (fixed, steered):
        controller.update(kl=60.0)
    assert fixed.value == 0.1
    assert steered.value == pytest.approx(0.1 * 1.2)  # the error is clipped at a fifth
    steered.update(kl=5.4)
    assert steered.value == pytest.approx(0.1 * 1.2 * 0.9)
    gentle = KlController(0.1, target=6.0, gain=0.1)  # Ziegler et al.
    gentle.update(kl=60.0)
    assert gentle.value == pytest.approx(0.1 * 1.02)


# A world of two tokens, four words each: sixteen completions whose optimum is known, π*(y) ∝ π_ref(y)·exp(r(y)/β).

WORDS, BETA = 4, 0.5


class Tabular:
    """A policy over two-token completions: logits of the first word, and of the second given the first."""

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.first = torch.randn(WORDS, generator=draw).requires_grad_()
        self.second = torch.randn(WORDS, WORDS, generator=draw).requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        return [self.first, self.second]

    def logps(self, words: Tensor) -> Tensor:
        """Per-token log-probs [2·n], flat, of completions [n, 2]."""
        first = self.first.log_softmax(0)[words[:, 0]]
        second = self.second.log_softmax(1)[words[:, 0], words[:, 1]]
        return torch.stack([first, second], 1).flatten()

    def distribution(self) -> Tensor:
        """Probabilities of all completions [16]."""
        return (self.first.log_softmax(0)[:, None] + self.second.log_softmax(1)).exp().flatten()

    def sample(self, n: int, draw: torch.Generator) -> Tensor:
        chosen = torch.multinomial(self.distribution().detach(), n, replacement=True, generator=draw)
        return torch.stack([chosen // WORDS, chosen % WORDS], 1)


REWARD = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(7))


def optimum(reference: Tabular) -> Tensor:
    weights = reference.distribution().detach() * (REWARD.flatten() / BETA).exp()
    return weights / weights.sum()


def distance(policy: Tabular, target: Tensor) -> float:
    """Total variation."""
    return 0.5 * float((policy.distribution().detach() - target).abs().sum())


def reinforce(algorithm: str, rounds: int = 400, n: int = 256) -> tuple[float, float]:
    """Distance from π* before and after ``rounds`` of rollout and four clipped epochs."""
    policy, reference, draw = Tabular(), Tabular(), torch.Generator().manual_seed(1)
    values = torch.zeros(1 + WORDS, requires_grad=True)  # of the start, and after each first word
    optimizer = torch.optim.Adam([*policy.parameters, values], lr=0.03)
    target, kl_coef = optimum(reference), BETA
    for turn in range(rounds):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - turn / rounds)
        words = policy.sample(n, draw)
        lengths = [2] * n
        states = torch.stack([torch.zeros(n, dtype=torch.long), 1 + words[:, 0]], 1).flatten()
        score = REWARD[words[:, 0], words[:, 1]]
        with torch.no_grad():
            old, theirs, value = policy.logps(words), reference.logps(words), values[states].clone()
        kl = k1(old, theirs)
        if algorithm == "ppo":
            reward = token_rewards(score, kl, lengths, kl_coef)
            advantage = gae(reward, value, lengths, gamma=1.0, lam=0.95)
            returns, advantage = advantage + value, whiten(advantage)
        else:
            whole = score - kl_coef * kl.view(n, 2).sum(1)
            compared = {
                "rloo": leave_one_out(whole[None]),
                "grpo": group_normalised(whole[None]),
                "grpo, KL in the loss": (score - score.mean())[None],
            }
            advantage = compared[algorithm][0].repeat_interleave(2)
        weight = per_token(lengths, "tokens" if algorithm == "ppo" else "completions")
        for _ in range(4):
            logps = policy.logps(words)
            loss = clipped_policy_loss(logps, old, advantage, 0.2) @ weight
            if algorithm == "ppo":
                loss = loss + 0.5 * (clipped_value_loss(values[states], value, returns, 0.2) @ weight)
            if algorithm == "grpo, KL in the loss":
                loss = loss + kl_coef * (k3(logps, theirs) @ weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return distance(Tabular(), target), distance(policy, target)


@pytest.mark.parametrize(("algorithm", "tolerance"), [("ppo", 0.005), ("rloo", 0.005), ("grpo", 0.005)])
def test_reinforcement_reaches_the_optimum(algorithm: str, tolerance: float) -> None:
    before, after = reinforce(algorithm)
    assert before > 0.3
    assert after < tolerance


def test_kl_in_the_loss_pulls_elsewhere() -> None:
    """GRPO as published (arXiv 2402.03300, equation 4) takes k3's own gradient, whose mean is that of KL(π_ref ‖ π),
    the wrong way round: it does not end at π*. So Sartor's GRPO has KL in the reward."""
    _, after = reinforce("grpo, KL in the loss")
    assert after > 0.05


def test_dpo_on_infinite_preferences_reaches_the_same() -> None:
    """Every pair of completions, weighted by how often π_ref draws it and by σ(r_i - r_j): no sampling, no noise."""
    from sartor.losses.dpo import dpo
    from sartor.types import PairLogps

    policy, reference = Tabular(), Tabular()
    target = optimum(reference)
    words = torch.cartesian_prod(torch.arange(WORDS), torch.arange(WORDS))
    i, j = torch.cartesian_prod(torch.arange(WORDS**2), torch.arange(WORDS**2)).T
    seen = reference.distribution().detach()
    reward = REWARD.flatten()
    weight = seen[i] * seen[j] * torch.sigmoid(reward[i] - reward[j])
    theirs = reference.logps(words).view(-1, 2).sum(1).detach()
    optimizer = torch.optim.LBFGS(policy.parameters, max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)
    lengths = torch.full_like(i, 2)

    def closure() -> Tensor:
        ours = policy.logps(words).view(-1, 2).sum(1)
        losses = dpo(PairLogps(ours[i], ours[j], theirs[i], theirs[j], lengths, lengths), beta=BETA)
        optimizer.zero_grad()
        loss = losses @ weight
        loss.backward()
        return loss

    optimizer.step(closure)
    assert distance(Tabular(), target) > 0.3
    assert distance(policy, target) < 1e-3


def test_online_dpo_reaches_the_same() -> None:
    """Pairs drawn from the current policy, labelled by σ of the true rewards' difference (Bradley-Terry)."""
    from sartor.losses.dpo import dpo
    from sartor.types import PairLogps

    policy, reference, draw = Tabular(), Tabular(), torch.Generator().manual_seed(2)
    target, rounds, n = optimum(reference), 600, 512
    optimizer = torch.optim.Adam(policy.parameters, lr=0.03)
    lengths = torch.full((n,), 2)
    for turn in range(rounds):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - turn / rounds)
        pair = [policy.sample(n, draw) for _ in range(2)]
        reward = [REWARD[words[:, 0], words[:, 1]] for words in pair]
        first = torch.rand(n, generator=draw) < torch.sigmoid(reward[0] - reward[1])
        chosen = torch.where(first[:, None], pair[0], pair[1])
        rejected = torch.where(first[:, None], pair[1], pair[0])
        with torch.no_grad():
            fixed = [reference.logps(words).view(n, 2).sum(1) for words in (chosen, rejected)]
        ours = [policy.logps(words).view(n, 2).sum(1) for words in (chosen, rejected)]
        loss = dpo(PairLogps(*ours, *fixed, lengths, lengths), beta=BETA).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert distance(policy, target) < 0.05
