"""The tabular world: its optimum, its gradient, and what known losses reach in it."""

import pytest
import torch

from sartor.discover.language.known import known
from sartor.discover.language.program import Program
from sartor.discover.rungs.tabular import ANSWERS, BETAS, PRICE, PROMPTS, Tabular, run_tabular, train


def test_the_optimum_is_known() -> None:
    world = Tabular(0)
    best = world.reference + world.reward / PRICE  # π* ∝ π_ref exp(r/λ)
    assert float(world.value(best.flatten()).mean()) == pytest.approx(1.0, abs=1e-5)
    assert float(world.value(world.reference.flatten()).mean()) == pytest.approx(0.0, abs=1e-6)
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = best + 0.3 * torch.randn(best.shape, generator=draw)
        assert float(world.value(other.flatten()).mean()) < 1.0


def test_the_gradient_is_that_of_log_softmax() -> None:
    world, draw = Tabular(1), torch.Generator().manual_seed(0)
    logits = torch.randn(2, PROMPTS * ANSWERS, generator=draw).requires_grad_()
    weights = torch.randn(2, PROMPTS * ANSWERS, generator=draw)
    (world.logratios(logits) * weights).sum().backward()
    assert torch.allclose(world.gradient(logits.detach(), weights), logits.grad, atol=1e-5)


def test_comparisons_follow_bradley_terry() -> None:
    agree, foretold = [], []
    for seed in range(20):
        world = Tabular(seed)
        pairs, reward = world.comparisons, world.reward.flatten()
        assert (pairs.better != pairs.worse).all()
        assert (pairs.better // ANSWERS == pairs.prompt).all()
        gap = reward[pairs.better] - reward[pairs.worse]
        agree.append((gap > 0).float().mean())
        foretold.append(torch.sigmoid(gap.abs() / PRICE).mean())
    assert float(torch.stack(agree).mean()) == pytest.approx(float(torch.stack(foretold).mean()), abs=0.01)


@pytest.mark.parametrize("seed", [0, 1])
def test_known_losses_learn_and_canaries_do_not(seed: int) -> None:
    names = ["dpo", "hinge", "cell", "sft", "zero", "constant", "inverted"]
    fitness = dict(zip(names, (one.fitness for one in run_tabular([known(n) for n in names], seed)), strict=True))
    assert min(fitness[name] for name in ("dpo", "hinge", "cell")) > 0.3
    assert fitness["zero"] == pytest.approx(0.0, abs=1e-6)
    assert fitness["constant"] == pytest.approx(0.0, abs=1e-6)
    assert fitness["inverted"] < 0
    assert min(fitness, key=fitness.__getitem__) == "inverted"


def test_many_at_once_are_as_one_by_one() -> None:
    names = ["dpo", "dbaql", "lrml"]
    together = train(Tabular(0), [Program(known(name)) for name in names])
    assert together.shape == (len(BETAS), 3, PROMPTS * ANSWERS)
    for i, name in enumerate(names):
        assert torch.allclose(train(Tabular(0), [Program(known(name))])[:, 0], together[:, i], atol=1e-5)
