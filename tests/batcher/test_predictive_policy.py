from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rollout.batcher.policies.predictive import PredictiveParameters, PredictivePolicy
from rollout.batcher.types import (
    NONE_WAITING,
    OVER_BUDGET,
    Bounds,
    Decision,
    FinishedRow,
    Observation,
    StepSample,
    WaitingRows,
)
from tests.support.observations import observe

ROWS_OF_200 = [FinishedRow(100, 200)] * 400
# Here a prefilled token costs as much as a step of ten rows.
DEAR_PREFILLS = tuple(StepSample(10, 1000, 10 * n, 1 + 10.0 * n) for n in range(40))
# These end within the horizon of a policy that has seen no step.
ROWS_OF_80 = [FinishedRow(100, 80)] * 400


def waiting(count: int, prompt: int = 100, max_new: int = 512, known: bool = False, group: int = 1) -> WaitingRows:
    return WaitingRows(
        np.full(count, prompt),
        np.zeros(count, np.int64),
        np.full(count, max_new),
        10_000 + np.arange(count) // group,
        np.full(count, known),
    )


def admits(seen: Observation, **changes: object) -> int:
    """Rows that a policy lets in with nothing learned but what ``seen`` tells."""
    return PredictivePolicy(Bounds(1, 4096)).decide(replace(seen, **changes)).rows - seen.live_rows


def test_memory_is_filled_up_to_the_accepted_risk():
    seen = observe([1] * 10, eta=100_000, finished=ROWS_OF_80, waiting=0)
    rows = admits(seen, waiting=waiting(800))
    # When all but a few of them end together at 180 tokens, what is missing is computed again.
    assert 0.9 < (rows + 10) * 180 / 100_000 < 1.1
    assert admits(seen, waiting=waiting(800), steps=DEAR_PREFILLS) < rows


def test_rows_about_to_end_make_room():
    """Of rows of 80 tokens, the old ones are gone before newcomers have grown."""
    old = admits(observe([70] * 500, eta=100_000, finished=ROWS_OF_80), waiting=waiting(400))
    young = admits(observe([10] * 500, eta=100_000, finished=ROWS_OF_80), waiting=waiting(400))
    assert young < 0.8 * old


def test_fewer_rows_are_admitted_before_any_finish():
    some = admits(observe([100] * 200, eta=60_000, finished=[FinishedRow(100, 101)] * 400), waiting=waiting(64))
    none = admits(observe([100] * 200, eta=60_000), waiting=waiting(64))
    assert none < some


def test_known_lengths_are_used_exactly():
    seen = observe([10] * 50, eta=10_000, max_new=110)
    seen = replace(seen, ends_at_limit=np.ones(50, bool))
    # At the end of the live rows 50 x 210 would not fit, were it not for less memory: 10,000 hold 47 rows.
    assert admits(seen, waiting=waiting(9, known=True, max_new=100)) == 0
    room = replace(seen, kv_tokens_free=seen.kv_tokens_free + 5000)
    # 10,500 then and 200 for each newcomer, who lives as long.
    assert admits(room, waiting=waiting(40, known=True, max_new=100)) == 22
    # Few are known until more are asked for: rows like them are imagined, as many as will fit.
    assert admits(room, waiting=waiting(1, known=True, max_new=100)) == 22


def test_max_new_tokens_bounds_the_forecast():
    """Nobody knows lengths, but no row goes beyond 20 tokens."""
    bounded = admits(observe([1] * 10, eta=10_000, max_new=20), waiting=waiting(200, max_new=20))
    free = admits(observe([1] * 10, eta=10_000, max_new=4096), waiting=waiting(200, max_new=4096))
    assert free < bounded <= (10_000 - 10 * 120) // 100


def test_shared_prompt_is_charged_once():
    seen = observe([1] * 10, prompt=800, eta=20_000, finished=ROWS_OF_200, waiting=0)
    alone = admits(seen, waiting=waiting(64, prompt=800))
    groups = admits(seen, waiting=waiting(64, prompt=800, group=16), groups=np.arange(10))
    assert 2 * alone < groups


def test_more_rows_than_known_waiting_rows_are_allowed():
    seen = observe([1] * 10, eta=100_000, finished=ROWS_OF_200)
    assert admits(seen, waiting=waiting(3)) > 50
    assert admits(seen) > 50, "as many as without any names"
    assert admits(replace(seen, waiting_rows=0)) == 0


def test_full_memory_admits_no_row_and_preempts_none():
    seen = observe([50] * 100, eta=100, finished=ROWS_OF_200)
    assert PredictivePolicy(Bounds()).decide(seen).rows == 100


def test_parameters_out_of_range_raise():
    with pytest.raises(ValueError, match="memory_rows"):
        PredictivePolicy(Bounds(), PredictiveParameters(memory_rows=0))


# -- the budget --------------------------------------------------------------------------------------------


def ran(rows: int, kv_tokens: int, prefill: int) -> StepSample:
    return StepSample(rows, kv_tokens, prefill, 5 + 0.1 * rows + 1e-4 * kv_tokens + 0.02 * prefill)


def budgeted(budget_ms: float, ages: list[int], steps: int = 200) -> Decision:
    """The decision of a policy that has seen steps of up to 100 rows."""
    policy = PredictivePolicy(Bounds(1, 1000, budget_ms))
    rng = np.random.default_rng(0)
    seen = [
        ran(int(r), int(r * rng.integers(100, 400)), int(rng.integers(0, 2048))) for r in rng.integers(0, 100, steps)
    ]
    return policy.decide(observe(ages, prompt=100, steps=seen, finished=ROWS_OF_200))


def test_prefill_gets_the_rest_of_the_budget():
    decision = budgeted(30.0, [100] * 50)
    ms = 5 + 0.1 * 50 + 1e-4 * 50 * 200 + 0.02 * decision.prefill_tokens
    assert decision.decode_rows == 50
    assert 0.9 * 30 < ms < 30


def test_reason_is_the_queue_where_no_row_waits():
    policy = PredictivePolicy(Bounds(1, 4096))
    assert policy.decide(observe([10] * 50, eta=100_000, waiting=0)).reason == NONE_WAITING
    full = replace(observe([100] * 90, eta=20_000, waiting=9), waiting=waiting(9))
    assert policy.decide(full).reason == "memory"


def test_rows_over_budget_are_paused_and_none_is_admitted():
    decision = budgeted(12.0, [100] * 90)
    rows = decision.decode_rows
    assert rows is not None
    assert 0.9 * 12 < 5 + 0.1 * rows + 1e-4 * rows * 200 < 12
    assert (decision.rows, decision.reason) == (90, "latency")
    longer = budgeted(12.0, [800] * 90).decode_rows
    assert longer is not None
    assert longer < rows, "long rows cost more"


def test_rows_are_admitted_up_to_the_budget():
    decision = budgeted(12.0, [100] * 20)
    assert decision.reason == "latency"
    assert 20 < decision.rows < 60


def test_unreachable_budget_is_reported_and_the_job_continues():
    decision = budgeted(3.0, [100] * 5)
    assert (decision.decode_rows, decision.reason) == (1, OVER_BUDGET)
    alone = budgeted(3.0, [])
    assert alone.prefill_tokens > 0
    assert alone.reason == OVER_BUDGET


def test_slow_first_steps_do_not_report_over_budget():
    early = budgeted(3.0, [100] * 5, steps=9)
    assert (early.decode_rows, early.reason) == (1, "latency")


def test_steps_grow_by_doubling_before_the_fit_is_known():
    policy = PredictivePolicy(Bounds(1, 1000, 50.0))
    first = policy.decide(observe([]))
    assert 0 < first.prefill_tokens <= 64
    second = policy.decide(observe([1] * 4, steps=[ran(4, 400, 64)]))
    assert second.prefill_tokens <= 128
    assert second.decode_rows == 4
