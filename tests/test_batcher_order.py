from __future__ import annotations

import numpy as np
import pytest

from rollout.batcher.order import early_enough, together
from rollout.batcher.victims import cheapest, youngest

UNKNOWN = float("nan")


def test_rows_of_a_group_follow_its_first():
    assert together(np.array([7, 3, 7, 5, 3, 7])).tolist() == [0, 2, 5, 1, 4, 3]


def test_without_expectations_arrival_decides():
    groups = np.array([2, 1, 2, 0])
    assert early_enough(groups, np.full(4, UNKNOWN), 8).tolist() == together(groups).tolist()


def test_equal_expectations_change_nothing():
    assert early_enough(np.arange(50), np.full(50, 30.0), 4).tolist() == list(range(50))


def test_what_is_as_long_as_the_job_goes_first_and_the_longest_before():
    expected = np.full(40, 10.0)
    expected[[20, 30]] = 500, 700
    assert early_enough(np.arange(40), expected, 4)[:2].tolist() == [30, 20]


@pytest.mark.parametrize("seed", range(5))
def test_short_rows_are_last_and_long_ones_spread(seed: int):
    print("seed", seed)
    expected = np.random.default_rng(seed).geometric(1 / 100, 2000).astype(float)
    order = early_enough(np.arange(2000), expected, 100)
    assert sorted(order.tolist()) == list(range(2000))
    placed = expected[order]
    assert placed[-20:].mean() < 30
    assert placed[:200].mean() < 200, "longest-first would have a mean of 330 there"
    # With 100 rows alive, a row starts about so many steps before the end; few outlast it, and by little.
    before_end, arrived = (lengths[::-1].cumsum()[::-1] / 100 for lengths in (placed, expected))
    assert (placed - before_end).max() < 0.4 * (expected - arrived).max()


def test_groups_stay_together_and_count_at_their_mean():
    groups = np.array([0, 1, 2, 0, 1, 2])
    expected = np.array([10.0, 900, 10, 10, UNKNOWN, 10])
    assert early_enough(groups, expected, 1).tolist()[:2] == [1, 4]


def test_the_cheapest_victim_has_the_fewest_tokens_to_compute_again():
    recompute = np.array([900, 300, 100, 100, 500])
    assert (cheapest(recompute), youngest(recompute)) == (3, 4)
