"""The arithmetic of the experiment, against enumeration and hand-worked numbers."""

import math
from itertools import combinations

import pytest

from sartor.compare.results import Point, _at_equal_kl, _ratio, best_of, cost_of, estimate, reward_at
from sartor.evaluate.statistics import Sample, crossed, mean


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_choices(n: int) -> None:
    scores = [0.3, -1.0, 0.7, 0.7, 0.1]
    every = [max(chosen) for chosen in combinations(scores, n)]
    assert best_of(scores, n) == pytest.approx(sum(every) / len(every))


def path(*points: tuple[float, float]) -> list[Point]:
    return [
        Point(step, {(0, "p"): reward}, {(0, "p"): 0.0}, {}, {"seconds": spent})
        for step, (spent, reward) in enumerate(points)
    ]


def test_cost_of_a_level_lies_on_the_line_between_two_evaluations() -> None:
    steps = path((10.0, 0.2), (30.0, 0.4), (50.0, 0.3), (70.0, 0.9))
    assert cost_of(steps, 0.2, 0.3, "seconds") == 20.0  # the first time that it is reached, not the last
    assert cost_of(steps, 0.2, 0.4, "seconds") == 30.0
    assert cost_of(steps, 0.2, 0.6, "seconds") == 60.0
    assert cost_of(steps, 0.0, 0.2, "seconds") == 20.0  # from where the start truly is, whatever step 0 happened to see
    with pytest.raises(ValueError, match="above all"):
        cost_of(steps, 0.2, 2.0, "seconds")


def gone(number: int, *points: tuple[float, float]) -> list[Point]:
    """A path of distances and rewards on two prompts, of which the second earns 0.1 more."""
    return [
        Point(
            step,
            {(number, "p"): reward, (number, "q"): reward + 0.1},
            {(number, "p"): kl - 0.05, (number, "q"): kl + 0.05},
            {},
            {},
        )
        for step, (kl, reward) in enumerate(points)
    ]


def test_rewards_are_compared_where_both_are_equally_far() -> None:
    further, nearer = gone(0, (0.0, 0.2), (4.0, 0.6), (9.0, 0.7)), gone(0, (0.0, 0.2), (3.0, 0.4), (2.25, 0.5))
    # Over √KL: 1 of the 2 from the start to 4 nats; of 6.25, half of the way from 2 to 3.
    assert reward_at(further, {(0, "p"): 0.95, (0, "q"): 1.05}) == pytest.approx({(0, "p"): 0.4, (0, "q"): 0.5})
    assert reward_at(further, {(0, "p"): 6.2, (0, "q"): 6.3}) == pytest.approx({(0, "p"): 0.65, (0, "q"): 0.75})
    backwards = gone(0, (0.0, 0.2), (4.0, 0.6), (1.5, 0.5))
    assert reward_at(backwards, {(0, "p"): 0.95, (0, "q"): 1.05})[0, "p"] == pytest.approx(0.4)  # on the way out
    other = [gone(1, (0.0, 0.2), (1.0, 0.6)), gone(1, (0.0, 0.2), (4.0, 0.4))]
    found = _at_equal_kl([further, other[0]], [nearer, other[1]])
    assert found["levels"] == pytest.approx([2.25, 1.0])  # where the nearer one ended, not where it had been
    assert found["reward"].value == pytest.approx(((0.5 - (0.2 + 0.75 * 0.4)) + (0.3 - 0.6)) / 2)
    assert reward_at(gone(0, (0.1, 0.2), (4.0, 0.6)), {(0, "p"): 0.0, (0, "q"): 0.1}) == {
        (0, "p"): 0.2,
        (0, "q"): 0.2 + 0.1,
    }
    for little in (-0.01, 0.02):
        stayed = _at_equal_kl([further], [gone(0, (0.0, 0.2), (little, 0.2))])
        assert stayed["why_none"] == "seed 0 has an arm not shown to leave the start"


def test_the_interval_at_equal_distance_knows_that_distances_are_estimates() -> None:
    """Where a prompt's reward is all a matter of how far it went, nothing is left by which prompts differ."""
    keys = [(0, f"p{i}") for i in range(6)]
    kl = {key: 4 + 0.5 * (i - 2.5) for i, key in enumerate(keys)}
    start = Point(0, dict.fromkeys(keys, 0.0), dict.fromkeys(keys, 1.0), {}, {})
    end = Point(1, {key: 0.2 * nats for key, nats in kl.items()}, kl, {}, {})  # the slope of 0.8 (√kl - 1) at 4 nats
    assert reward_at([start, end], dict.fromkeys(keys, 4.0)) == pytest.approx(dict.fromkeys(keys, 0.8))


def seeded(number: int, *points: tuple[float, float]) -> list[Point]:
    """A path on three prompts that differ a little."""
    return [
        Point(
            step,
            {(number, f"p{i}"): reward + 0.01 * i for i in range(3)},
            {(number, f"p{i}"): 0.0 for i in range(3)},
            {},
            {"seconds": spent, "flops": 2 * spent},
        )
        for step, (spent, reward) in enumerate(points)
    ]


def test_the_ratio_is_that_of_costs_up_to_the_lower_end() -> None:
    start = {(seed, f"p{i}"): 0.2 + 0.01 * i for seed in range(2) for i in range(3)}
    ours = [seeded(0, (10, 0.2), (30, 0.6)), seeded(1, (10, 0.2), (30, 0.6))]
    theirs = [seeded(0, (100, 0.2), (140, 0.4)), seeded(1, (100, 0.2), (300, 0.4))]
    found = _ratio(ours, theirs, start)
    assert found["levels"] == pytest.approx([0.41, 0.41])  # the mean of three prompts
    assert found["seconds"].value == pytest.approx(math.sqrt(140 / 20 * 300 / 20))
    assert found["flops"].value == pytest.approx(found["seconds"].value)


def test_nothing_reached_has_no_price() -> None:
    start = {(seed, f"p{i}"): 0.2 + 0.01 * i for seed in range(2) for i in range(3)}
    ours = [seeded(seed, (10, 0.2), (30, 0.6)) for seed in range(2)]
    theirs = [seeded(seed, (100, 0.25), (200, 0.15), (300, 0.18)) for seed in range(2)]
    assert _ratio(ours, theirs, start)["why_none"] == "PPO on a reward model shows no gain over the start"
    assert _ratio(theirs, ours, start)["why_none"] == "DPO shows no gain over the start"


def test_an_interval_over_prompts_and_seeds_knows_what_either_alone_does_not() -> None:
    prompts, seeds = [f"p{i}" for i in range(8) for _ in range(3)], [j for _ in range(8) for j in range(3)]
    # All that varies is the seed: the interval is that of three numbers, however many prompts there are.
    values = [float(seed) for seed in seeds]
    found, three = crossed([Sample(values, prompts)], [seeds]), mean([0.0, 1.0, 2.0])
    assert (found.value, found.low, found.high) == pytest.approx((three.value, three.low, three.high))
    # All that varies is the prompt: its standard error, with the degrees of freedom of three seeds.
    values = [float(prompt[1:]) for prompt in prompts]
    found, eight = crossed([Sample(values, prompts)], [seeds]), mean([float(i) for i in range(8)])
    assert (found.high - found.value) / (eight.high - eight.value) == pytest.approx(4.30265 / 2.36462, rel=1e-4)
    one = crossed([Sample([1.0, 2.0], ["a", "b"])], [[0, 0]])
    assert one.value == 1.5
    assert math.isinf(one.high)


def test_a_difference_is_taken_prompt_by_prompt_and_seed_by_seed() -> None:
    before = {(seed, f"p{i}"): float(i) for seed in range(3) for i in range(5)}
    after = {key: value + 1.0 for key, value in before.items()}
    found = estimate(after, before)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
