"""What candidates are judged by: bits, worth, and settings that are not chosen where they are judged."""

import math

import pytest
import torch

from sartor.discover.rungs.outcome import Pairs, Scored, Setting, bits, choose, forecast, judged, worth


def pairs(count: int) -> Pairs:
    """One pair a prompt: branches 0 and 1 of the first, 2 and 3 of the second."""
    at = torch.arange(count)
    return Pairs(2 * at, 2 * at + 1, at)


def test_bits_know_no_scale_of_the_loss() -> None:
    moved = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(bits(moved, pairs(20)), bits(1000 * moved, pairs(20)), atol=1e-6)


def test_bits_are_those_of_the_best_temperature() -> None:
    moved = torch.randn(80, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moved[::2] += 1
    margins = moved[::2] - moved[1::2]
    by_grid = max(
        float(1 + torch.nn.functional.logsigmoid(t * margins).mean() / math.log(2)) for t in torch.linspace(0, 5, 5001)
    )
    assert float(bits(moved, pairs(40)).mean()) == pytest.approx(by_grid, abs=1e-6)


@pytest.mark.parametrize(("sign", "wanted"), [(1.0, 1.0), (-1.0, 0.0), (0.0, 0.0)])
def test_bits_of_certainty_of_the_inverse_and_of_nothing(sign: float, wanted: float) -> None:
    moved = sign * torch.tensor([1.0, -1.0] * 10, dtype=torch.float64)
    assert float(bits(moved, pairs(10)).mean()) == pytest.approx(wanted, abs=1e-6)


def test_worth_is_the_value_of_a_tilt_of_normal_scores() -> None:
    # Log-ratios that go with the score and ones that do not: two policies π ∝ π_ref · exp(d), seen by many answers.
    draw = torch.Generator().manual_seed(2)
    score, other = torch.randn(2, 400_000, generator=draw).double()
    tilts = torch.stack([0.5 * score, 0.3 * score + 0.4 * other, -0.2 * score])
    scored = Scored(score, torch.zeros(len(score), dtype=torch.long))
    weights = tilts.softmax(-1)
    reward = (weights * score).sum(-1)
    kl = torch.special.xlogy(weights, weights * len(score)).sum(-1)
    found = worth(tilts, scored)[:, 0]
    assert torch.allclose(found, reward - scored.price * kl, atol=5e-3)
    assert torch.allclose(worth(tilts + 7, scored)[:, 0], found, atol=1e-9)  # a shift of all answers is none
    # To first order log-ratios average to 0; the true ones are those of chances that sum to one.
    best, worst = int(score.argmax()), int(score.argmin())
    pair = Pairs(torch.tensor([best]), torch.tensor([worst]), torch.tensor([0]))
    true = (weights[0] * len(score)).log()
    assert forecast(tilts[0], pair, scored) == pytest.approx(
        {
            "accuracy": 1.0,
            "margin": float(true[best] - true[worst]),
            "chosen": float(true[best]),
            "rejected": float(true[worst]),
            "reward": float(reward[0]),
            "kl": float(kl[0]),
        },
        abs=1e-2,
    )


def test_worth_is_not_biased_by_few_answers() -> None:
    draw = torch.Generator().manual_seed(3)
    score, prompt = torch.randn(60_000, generator=draw).double(), torch.arange(20_000).repeat_interleave(3)
    scored = Scored(score + prompt % 2, prompt)
    pair = Pairs(*torch.tensor([[0], [1], [0]]))
    found = forecast(0.5 * score + prompt % 3, pair, scored)  # prompts differ in both, and that is no merit
    assert (found["reward"], found["kl"]) == pytest.approx((1.0, 0.125), rel=0.03)


def test_a_setting_is_not_judged_where_it_was_chosen() -> None:
    values = torch.tensor([[9.0, 0.0, 9.0, 0.0], [0.0, 8.0, 0.0, 8.0], [1.0, 1.0, 1.0, 1.0]])
    # On even prompts the first is best, so it is judged on odd ones, where it is worth nothing; and so the second.
    scores, at = choose(values)
    assert scores.tolist() == [0.0, 0.0, 0.0, 0.0]
    assert at == 0


def test_what_fell_apart_is_worst() -> None:
    settings = [Setting(0.1, 1e-4), Setting(1.0, 1e-4)]
    broken = torch.full((1, 2, 8), torch.nan)
    half = torch.stack([torch.full((8,), torch.nan), torch.tensor([1.0, -1.0] * 4)])[None]
    assert judged(broken, pairs(4), settings)[0].fitness == -math.inf
    found = judged(half, pairs(4), settings)[0]
    assert found.setting == settings[1]
    assert found.fitness == pytest.approx(1.0, abs=1e-5)


def test_prompts_count_alike_however_many_pairs_they_have() -> None:
    # The first prompt has three pairs, all wrong; the second has one, right.
    many = Pairs(torch.tensor([0, 0, 0, 2]), torch.tensor([1, 1, 1, 3]), torch.tensor([0, 0, 0, 1]))
    found = judged(torch.tensor([[[-1.0, 1.0, 1.0, -1.0]]]), many, [Setting(0.1, 1e-4)])[0]
    assert found.measures["accuracy"] == pytest.approx(0.5)
