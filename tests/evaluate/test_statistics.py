import numpy as np
import pytest

from sartor.evaluate.statistics import mean, proportion


def test_wilson_against_the_published_example() -> None:
    # Newcombe 1998 (Stat Med 17:857), table I, method 3: 81/263 and 0/20.
    assert proportion([1.0] * 81 + [0.0] * 182).low == pytest.approx(0.2553, abs=5e-5)
    assert proportion([1.0] * 81 + [0.0] * 182).high == pytest.approx(0.3662, abs=5e-5)
    assert (proportion([0.0] * 20).low, proportion([0.0] * 20).high) == (0.0, pytest.approx(0.1611, abs=5e-5))


def test_groups_of_one_are_no_groups() -> None:
    values = [0.3, 1.2, -0.7, 2.2]
    assert mean(values) == mean(values, groups=[0, 1, 2, 3])


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """95 % of intervals hold the true mean, with groups of five alike values; ignoring the groups would hold 60 %."""
    rng = np.random.default_rng(0)
    covered = {"groups": 0, "none": 0}
    for _ in range(1000):
        x = np.repeat(rng.normal(size=30), 5) + 0.3 * rng.normal(size=150)
        clustered, naive = mean(x.tolist(), groups=np.repeat(np.arange(30), 5).tolist()), mean(x.tolist())
        covered["groups"] += clustered.low <= 0 <= clustered.high
        covered["none"] += naive.low <= 0 <= naive.high
    assert 925 <= covered["groups"] <= 970
    assert covered["none"] < 750


def test_unequal_groups_weigh_by_their_size() -> None:
    assert mean([1.0, 1.0, 1.0, 5.0], groups=[0, 0, 0, 1]).value == 2.0


def test_nothing_and_one_group_claim_nothing() -> None:
    assert np.isnan(mean([]).value)
    assert mean([3.0, 4.0], groups=[0, 0]).low == float("-inf")
