from __future__ import annotations

import numpy as np
import pytest

from rollout.batcher.admission_order import Ordering, by_group, by_latest_start, steady_rows
from rollout.batcher.preemption import cheapest, youngest

UNKNOWN = float("nan")


def test_by_group_puts_rows_behind_first_of_their_group():
    assert by_group(np.array([7, 3, 7, 5, 3, 7])).tolist() == [0, 2, 5, 1, 4, 3]


def test_order_without_expectations_is_by_group():
    groups = np.array([2, 1, 2, 0])
    assert by_latest_start(groups, np.full(4, UNKNOWN), 8).tolist() == by_group(groups).tolist()


def test_equal_expectations_keep_order_of_arrival():
    assert by_latest_start(np.arange(50), np.full(50, 30.0), 4).tolist() == list(range(50))


def test_rows_as_long_as_the_job_go_first_longest_first():
    expected = np.full(40, 10.0)
    expected[[20, 30]] = 500, 700
    assert by_latest_start(np.arange(40), expected, 4)[:2].tolist() == [30, 20]


@pytest.mark.parametrize("seed", range(5))
def test_long_rows_are_spread_and_short_rows_are_last(seed: int):
    print("seed", seed)
    expected = np.random.default_rng(seed).geometric(1 / 100, 2000).astype(float)
    order = by_latest_start(np.arange(2000), expected, 100)
    assert sorted(order.tolist()) == list(range(2000))
    placed = expected[order]
    assert placed[-20:].mean() < 30
    assert placed[:200].mean() < 200, "longest-first would have a mean of 330 there"
    # With 100 rows alive, a row starts about so many steps before the end; few outlast it, and by little.
    before_end, arrived = (lengths[::-1].cumsum()[::-1] / 100 for lengths in (placed, expected))
    assert (placed - before_end).max() < 0.4 * (expected - arrived).max()


def test_group_stays_together_at_start_of_its_longest_row():
    groups = np.array([0, 1, 2, 0, 1, 2])
    expected = np.array([300.0, 10, 10, 300, 500, 10])
    assert by_latest_start(groups, expected, 1).tolist() == [1, 4, 0, 3, 2, 5]
    expected[1] = UNKNOWN
    assert by_latest_start(groups, expected, 1).tolist()[:2] == [1, 4]


def test_cheapest_victim_has_fewest_tokens_to_recompute():
    recompute = np.array([900, 300, 100, 100, 500])
    assert (cheapest(recompute), youngest(recompute)) == (3, 4)


# -- what expectations are worth -------------------------------------------------------------------------


def learned(rng: np.random.Generator, count: int, error: float, unit: float = 1.0) -> Ordering:
    """An ordering that saw rows end whose hints had this log-normal error; inf tells nothing."""
    ordering = Ordering()
    lengths = 300 * np.exp(rng.standard_normal(count))
    hints = rng.permutation(lengths) if np.isinf(error) else lengths * np.exp(error * rng.standard_normal(count))
    for hint, length in zip(unit * hints, np.rint(lengths), strict=True):
        ordering.learn(float(hint), int(length))
    return ordering


def waiting(rng: np.random.Generator, count: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.arange(count), np.full(count, 50), 300 * np.exp(rng.standard_normal(count))


def ordered(ordering: Ordering, rows: tuple[np.ndarray, np.ndarray, np.ndarray], kv_tokens: int = 20_000) -> list[int]:
    return ordering.order(*rows, kv_tokens).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_hints_are_used_at_first_and_while_exact(seed: int):
    print("seed", seed)
    rng = np.random.default_rng(seed)
    groups, prompts, hints = waiting(rng)
    believed = by_latest_start(groups, hints, steady_rows(20_000, prompts, hints)).tolist()
    assert ordered(Ordering(), (groups, prompts, hints)) == believed != groups.tolist()
    place = np.argsort(ordered(learned(rng, 500, 0.0), (groups, prompts, hints)))
    assert np.abs(place - np.argsort(believed)).mean() < 10, "only rounding is between them"


@pytest.mark.parametrize("seed", range(3))
def test_vague_hints_send_long_rows_first(seed: int):
    print("seed", seed)
    rng = np.random.default_rng(seed)
    rows = waiting(rng)
    vague, right = (np.argsort(ordered(learned(rng, 500, error), rows)) for error in (0.8, 0.0))
    assert np.corrcoef(vague, np.log(rows[2]))[0, 1] < np.corrcoef(right, np.log(rows[2]))[0, 1] < 0


@pytest.mark.parametrize("seed", range(5))
def test_useless_hints_keep_order_of_arrival(seed: int):
    print("seed", seed)
    rng = np.random.default_rng(seed)
    rows = waiting(rng)
    assert ordered(learned(rng, 500, np.inf), rows) == rows[0].tolist()
    # Nor does it matter that all hints were the same.
    same = Ordering()
    for length in range(1, 99):
        same.learn(100.0, length)
    assert ordered(same, rows) == rows[0].tolist()


def test_unit_of_hints_does_not_change_order():
    rng = np.random.default_rng(3)
    groups, prompts, hints = waiting(rng)
    tokens = learned(np.random.default_rng(4), 500, 0.3)
    characters = learned(np.random.default_rng(4), 500, 0.3, unit=4.0)
    assert ordered(tokens, (groups, prompts, hints)) == ordered(characters, (groups, prompts, 4 * hints))


def test_unknown_hints_are_ignored():
    ordering = Ordering()
    for _ in range(100):
        ordering.learn(UNKNOWN, 7)
    groups, prompts = np.array([0, 1, 0, 2]), np.full(4, 10)
    assert ordering.order(groups, prompts, np.full(4, UNKNOWN), 500).tolist() == [0, 2, 1, 3]
    assert ordering.order(groups, prompts, np.array([UNKNOWN, 10.0, UNKNOWN, 900.0]), 500).tolist() == [3, 0, 2, 1]
    assert ordering.order(groups[:0], prompts[:0], np.zeros(0), 500).tolist() == []


def test_most_rows_lengthens_the_job_and_delays_long_rows():
    expected = np.array([10.0] * 30 + [60.0])
    rows = np.arange(31), np.full(31, 10), expected
    assert Ordering().order(*rows, 10_000).tolist()[0] == 30
    assert Ordering().order(*rows, 10_000, most_rows=2).tolist()[0] == 0


def test_ordering_changes_when_hints_turn_out_inexact():
    rng = np.random.default_rng(0)
    for error, changes in ((0.0, False), (1.0, True)):
        ordering = Ordering()
        assert ordering.changed(), "there was none yet"
        ordered(ordering, waiting(rng))
        asked = []
        for length in np.rint(100 * np.exp(rng.standard_normal(300))):
            ordering.learn(float(max(1.0, length) * np.exp(error * rng.standard_normal())), int(max(1, length)))
            asked.append(ordering.changed())
        assert any(asked) == changes
        assert sum(asked) < 40, "looked at from time to time"
