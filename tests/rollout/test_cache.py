import torch

from sartor.rollout.cache import KeyValueCache


def test_keep_moves_the_last_rows_into_the_gaps() -> None:
    cache = KeyValueCache(6, 4, torch.device("cpu"))
    for row in range(6):
        cache.fill(0, [row], torch.full((1, 2, 3), float(row)), torch.full((1, 2, 3), float(row)))
        cache.lengths[row] = row + 1
    keys, values = cache.layers[0]
    order = cache.keep([1, 2, 4, 5])
    assert sorted(order) == [1, 2, 4, 5]
    assert cache.rows == 4
    assert cache.lengths == [row + 1 for row in order]
    assert keys[:4, 0, 0, 0].tolist() == values[:4, 0, 0, 0].tolist() == [float(row) for row in order]
    assert cache.layers[0][0] is keys  # in place
    assert cache.keep([0, 1]) == [0, 1]


def test_a_row_that_runs_nothing_stays_where_it_is() -> None:
    cache = KeyValueCache(2, 8, torch.device("cpu"))
    cache.lengths = [5, 5]
    cache.idle(1)
    cache.advance([True, False])
    assert cache.lengths == [6, 1]
    assert cache.positions.tolist() == [5, 0]
    assert cache.longest == 6
