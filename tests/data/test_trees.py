import random

import pytest
import torch
from conftest import random_tree

from sartor.data.trees import TokenTree, pack, split_by_budget


def test_every_completion_token_is_scored_by_the_row_before_it(rng: random.Random) -> None:
    trees = [random_tree(rng, prompt, branches) for prompt, branches in ((0, 2), (4, 1), (7, 5))]
    batch = pack(trees)
    scored = iter(zip(batch.source.tolist(), batch.target.tolist(), batch.branch.tolist(), strict=True))
    number = 0
    for tree in trees:
        for branch in tree.branches:
            sequence = tree.prompt + branch
            for place in range(max(1, len(tree.prompt)), len(sequence)):
                source, target, of_branch = next(scored)
                assert target == sequence[place]
                assert batch.ids[source] == sequence[place - 1]
                assert batch.positions[source] == place - 1
                assert of_branch == number
            assert batch.lengths[number] == len(sequence) - max(1, len(tree.prompt))
            number += 1
    assert next(scored, None) is None


def test_pairs_ties_and_verdicts_follow_from_the_ranks() -> None:
    tree = TokenTree((1,), ((2,), (3,), (4,), (5,)), (3.0, 2.0, 1.0, 3.0))
    assert tree.pairs == ((1, 0), (1, 3), (2, 0), (2, 1), (2, 3))
    assert tree.ties == ((0, 3),)
    assert tree.verdicts == (False, None, True, False)
    assert TokenTree((1,), ((2,), (3,)), (1.0, 1.0)).verdicts == ()
    assert TokenTree((1,), ((2,), (3,)), good=(False,), mismatched=1).verdicts == (False,)


def test_prompt_is_computed_once() -> None:
    assert TokenTree((1,) * 100, ((2,) * 5,) * 9).size == 145


def test_branch_numbers() -> None:
    batch = pack([TokenTree((1, 1), ((2,), (3, 3))), TokenTree((), ((4, 4),))])
    assert batch.branch_of_token.tolist() == [0, 0, 1, 2, 2, 1, 1]


@pytest.mark.parametrize("budget", [1, 50, 99, 100, 10_000])
def test_budget_keeps_every_item_once_and_whole(budget: int, rng: random.Random) -> None:
    sizes = [rng.randint(1, 100) for _ in range(40)]
    groups = list(split_by_budget(sizes, budget))
    assert sorted(i for group in groups for i in group) == list(range(40))
    assert all(len(group) == 1 or sum(sizes[i] for i in group) <= budget for group in groups)


def test_batch_moves_whole() -> None:
    batch = pack([TokenTree((1,), ((2, 3),))]).to("meta")
    assert all(value.device.type == "meta" for value in vars(batch).values() if isinstance(value, torch.Tensor))
