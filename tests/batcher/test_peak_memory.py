from __future__ import annotations

import numpy as np
import pytest

from rollout.batcher.estimators.peak_memory import future_peak, rows_that_fit
from rollout.batcher.estimators.row_memory import RowMemory, live_rows, waiting_rows
from rollout.batcher.simulation.oracle import OraclePolicy
from rollout.batcher.types import Bounds, Observation, WaitingRows


def by_steps(held: list[float], grows: list[float], remaining: list[int]) -> float:
    """The peak, looked for at every step."""
    return max(
        sum(h + g * t for h, g, r in zip(held, grows, remaining, strict=True) if t <= r)
        for t in range(max(remaining) + 1)
    )


@pytest.mark.parametrize("seed", range(20))
def test_future_peak_equals_maximum_over_all_steps(seed: int):
    print("seed", seed)
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 12))
    held, grows, remaining = rng.integers(1, 50, count), rng.integers(0, 2, count), rng.integers(0, 30, count)
    peak = future_peak(held.astype(float), grows.astype(float), remaining.astype(float))
    assert peak == by_steps(held.tolist(), grows.tolist(), remaining.tolist())


def test_future_peak_of_no_rows_is_zero():
    assert future_peak(np.zeros(0), np.zeros(0), np.zeros(0)) == 0


def observation(groups: list[int], page: int, waiting: WaitingRows | None = None, eta: int = 1000) -> Observation:
    count = len(groups)
    return Observation(
        prompt_tokens=np.full(count, 100),
        generated_tokens=np.full(count, 10),
        max_new_tokens=np.full(count, 50),
        waiting_rows=5,
        waiting_prompt_tokens=500,
        kv_tokens_held=0,
        kv_tokens_free=eta,
        headroom_bytes=0,
        bytes_per_token=1,
        page_tokens=page,
        groups=np.array(groups, np.int64),
        ends_at_limit=np.ones(count, bool),
        waiting=waiting,
    )


def waiting(*groups: int, kept: int = 0) -> WaitingRows:
    count = len(groups)
    return WaitingRows(
        np.full(count, 100), np.full(count, kept), np.full(count, 50), np.array(groups), np.ones(count, bool)
    )


def test_full_pages_of_a_prompt_count_once():
    rows, shared = live_rows(observation([1, 1, 1, 2], 16))
    assert rows.own_tokens.tolist() == [110 - 96 + 7.5] * 4
    assert shared.tokens.tolist() == [96, 96]
    assert shared.holders.tolist() == [3, 1]
    assert shared.max_over_holders(np.array([4.0, 9.0, 2.0, 1.0])).tolist() == [9, 1]


def test_waiting_rows_that_join_their_prompt_hold_only_their_own():
    own = waiting_rows(observation([1, 2], 16, waiting(2, 3, 3, 4, kept=3))).own_tokens
    assert own.tolist() == [7 + 7.5, 103 + 7.5, 7 + 7.5, 103 + 7.5]


def test_unknown_waiting_rows_become_one_average_row():
    rows = waiting_rows(observation([1], 1))
    assert (rows.own_tokens.tolist(), rows.limits.tolist()) == ([100], [50])


def test_rows_that_fit_keep_the_peak_within_memory():
    rows = RowMemory(np.array([100.0]), np.array([0]), np.array([100]), np.ones(1, bool))
    more = RowMemory(np.full(5, 50.0), np.zeros(5, np.int64), np.full(5, 20), np.ones(5, bool))
    _, shared = live_rows(observation([1], 1))
    # At the end of the short ones: 120 + 70 a row; at the end of the long one 200.
    assert [rows_that_fit(rows, shared, more, tokens) for tokens in (199, 200, 260, 400, 1000)] == [0, 1, 2, 4, 5]


def test_oracle_admits_rows_that_never_outgrow_memory():
    def rows(eta: int) -> int:
        return OraclePolicy(Bounds()).decide(observation([1, 2], 1, waiting(3, 4, 5), eta)).rows

    # Two rows end at 150 tokens each; when they do, a newcomer has 140.
    assert [rows(eta) for eta in (300, 439, 440, 580, 10_000)] == [2, 2, 3, 4, 5]
