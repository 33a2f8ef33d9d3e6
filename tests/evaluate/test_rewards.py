"""A reward model's evaluation, against counts made by hand."""

import pytest

from sartor.data.trees import TokenTree
from sartor.evaluate.rewards import ScoredTrees


def scored() -> ScoredTrees:
    trees = [
        TokenTree((1,), ((1, 1), (1,)), (1.0, 2.0), strength=1.0),
        TokenTree((2,), ((1,), (1, 1, 1)), (1.0, 2.0), strength=3.0),
        TokenTree((3,), ((1,), (1, 1)), (1.0, 2.0), strength=3.0),
        TokenTree((4,), ((1, 1, 1), (1, 1)), (1.0, 2.0), strength=1.0),
    ]
    return ScoredTrees(trees, [[2.0, 1.0], [0.0, 3.0], [5.0, 1.0], [1.0, 1.0]], range(4))


def test_accuracy_counts_equal_rewards_as_a_half() -> None:
    assert [pair.right for pair in scored().pairs] == [1.0, 0.0, 1.0, 0.5]
    assert scored().accuracy().value == pytest.approx(2.5 / 4)


def test_by_length_and_by_strength() -> None:
    by_length = scored().by_length()
    assert by_length["longer"].value == pytest.approx(0.75)  # rows 1 and 4
    assert by_length["shorter"].value == pytest.approx(0.5)  # rows 2 and 3
    rows = scored().by_strength()
    assert [(row["value"], row["right"].value) for row in rows] == [("1", 0.75), ("3", 0.5)]
    preferred = scored().longer_preferred()
    # The model prefers the longer one in rows 1 and 2, half of row 4; people in rows 1 and 4.
    assert (preferred["model"].value, preferred["people"].value) == (pytest.approx(2.5 / 4), pytest.approx(0.5))


def test_pick_rate_of_rankings_with_ties() -> None:
    trees = [
        TokenTree((1,), ((1,),) * 4, (1.0, 1.0, 2.0, 3.0)),
        TokenTree((2,), ((1,),) * 3, (3.0, 2.0, 1.0)),
        TokenTree((3,), ((1,),) * 2, (1.0, 2.0)),  # a pair is no ranking
    ]
    found = ScoredTrees(trees, [[0.0, 5.0, 1.0, 2.0], [4.0, 4.0, 0.0], [1.0, 0.0]], range(3))
    assert len(found.pairs) == 5 + 3 + 1  # tied answers are no pair
    pick = found.pick_rate()
    assert pick is not None
    assert pick.value == 0.5
    assert found.chance() == pytest.approx((2 / 4 + 1 / 3) / 2)
    assert [row["value"] for row in found.by_strength()] == ["1", "2"]  # places apart


def test_a_model_as_sure_as_it_is_right_is_calibrated() -> None:
    """Of 1,000 pairs at σ(margin) = 0.8 it is right in 800."""
    margin = 1.3862943611198906  # log 4
    trees = [TokenTree((i,), ((1,), (1, 1)), (1.0, 2.0)) for i in range(1000)]
    rewards = [[margin, 0.0] if i % 5 else [0.0, margin] for i in range(1000)]
    found = ScoredTrees(trees, rewards, range(1000))
    assert found.calibration_error() == pytest.approx(0.0, abs=1e-9)
    assert all(row["predicted"] == pytest.approx(0.8) for row in found.calibration())
    sure = ScoredTrees(trees, [[9 * a, 9 * b] for a, b in rewards], range(1000))
    assert sure.calibration_error() == pytest.approx(0.2, abs=1e-3)


def test_pairs_of_one_prompt_are_one_unit() -> None:
    trees = [TokenTree((1,), ((1,), (1, 1)), (1.0, 2.0)) for _ in range(50)]
    alike = ScoredTrees(trees, [[1.0, 0.0]] * 50, [0] * 50).accuracy()
    apart = ScoredTrees(trees, [[1.0, 0.0]] * 50, range(50)).accuracy()
    assert alike.low < apart.low
    assert (alike.n, apart.n) == (1, 50)
