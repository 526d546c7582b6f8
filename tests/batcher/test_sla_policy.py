from __future__ import annotations

import math

import numpy as np
import pytest

from rollout.batcher.policies.sla import SlaParameters, SlaPolicy
from rollout.batcher.types import OVER_BUDGET, Bounds, Decision
from tests.support.observations import observe, step


def follow(policy: SlaPolicy, *ran: tuple[int, float]) -> list[int]:
    """Row targets after each step of (rows, ms)."""
    return [policy.decide(observe(steps=[step(rows, ms)])).rows for rows, ms in ran]


def by_hand(min_rows: int = 1, max_rows: int = 400) -> SlaPolicy:
    """D = 50 ms, tolerance 2 ms, alpha 20, delta 5, an update each step."""
    return SlaPolicy(Bounds(min_rows, max_rows, 50), SlaParameters(alpha=20, delta=5, epsilon_d=2, step_window=1))


def test_algorithm_2_line_by_line():
    policy = by_hand()
    assert policy.decide(observe()).rows == 200  # [1, 400]
    assert follow(
        policy,
        (200, 74),  # over:   high = max(200, 1+20), low = max(1-5, 1)       [1, 200]
        (100, 45),  # under:  low = min(100, 200-20), high = 200+5           [100, 205]
        (152, 63),  # over:   high = max(152, 100+20), low = 100-5           [95, 152]
        (110, 60),  # over:   high = max(110, 95+20), low = 95-5             [90, 115]
        (123, 50),  # within: 123 -+ 10                                      [113, 133]
        (123, 40),  # under:  low = min(123, 133-20), high = 133+5           [113, 138]
    ) == [100, 152, 123, 102, 123, 125]


def test_the_tolerance_is_on_both_sides_of_the_budget():
    assert follow(by_hand(), (100, 52), (100, 48)) == [100, 100]
    assert follow(by_hand(), (100, 52.1)) == [50]  # [1, 100]
    assert follow(by_hand(), (100, 47.9)) == [250]  # [100, 400]


def test_the_default_tolerance_is_a_fifth_of_the_budget():
    def policy() -> SlaPolicy:
        return SlaPolicy(Bounds(1, 400, 50), SlaParameters(step_window=1))

    assert follow(policy(), (100, 59.9), (100, 40.1)) == [100, 100]
    assert follow(policy(), (100, 60.1)) == [50]


def test_the_interval_stays_within_the_bounds():
    # [396, 400], then line 6 says high = 396+20: clamped to 400, with low = 396-5.
    assert follow(by_hand(), (398, 50), (398, 90)) == [398, 395]
    # [1, 5], then line 9 says low = 5-20: clamped to 1, with high = 5+5.
    assert follow(by_hand(), (3, 50), (3, 10)) == [3, 5]


def test_one_row_is_within_reach_when_the_budget_asks_for_it():
    # [1, 400] -> [1, 21], then high goes down by delta, as alpha alone would keep it at 21 and the batch at 11.
    assert follow(by_hand(), (20, 90), (11, 90), (8, 90), (6, 90), (3, 90), (1, 90)) == [11, 8, 6, 3, 1, 1]


def test_all_of_a_small_cap_is_within_reach():
    # [1, 16] -> low goes up by delta, as high - alpha is below the bounds.
    assert follow(by_hand(max_rows=16), (8, 10), (11, 10), (13, 10), (16, 10)) == [11, 13, 16, 16]


def test_the_interval_waits_while_the_batch_that_ran_is_far_from_the_bound():
    # Rows in decode keep the batch large, or a lack of rows small: the middle must not creep on meanwhile.
    assert follow(by_hand(), (200, 90), (200, 90)) == [100, 100]  # [1, 200]
    assert follow(by_hand(), (100, 10), (100, 10)) == [250, 250]  # [100, 400]


def test_within_the_tolerance_a_batch_near_a_bound_stays():
    assert follow(by_hand(), (3, 50), (398, 50)) == [3, 398]


def test_rows_in_decode_are_kept():
    policy = by_hand()
    assert policy.decide(observe([5] * 300 + [0] * 50)).rows == 300
    assert policy.decide(observe([5] * 500)).rows == 400


def test_an_update_takes_a_whole_window_of_decode_steps():
    policy = SlaPolicy(Bounds(1, 400, 50), SlaParameters(epsilon_d=2, step_window=3))
    assert follow(policy, (100, 90), (100, 90)) == [200, 200]
    # A step without rows in decode is not a sample.
    assert policy.decide(observe(steps=[step(0, 500, prefill_tokens=2048)])).rows == 200
    # Beside a prefill, rows in decode wait as long: that is their latency. b_bar = 106.
    assert policy.decide(observe(steps=[step(118, 90, prefill_tokens=512)])).rows == 53
    assert follow(policy, (53, 90), (53, 90)) == [53, 53]


def test_a_single_slow_step_does_not_count():
    policy = SlaPolicy(Bounds(1, 400, 50), SlaParameters(epsilon_d=2, step_window=3))
    assert policy.decide(observe(steps=[step(100, 50), step(100, 9000), step(100, 51)])).rows == 100


def test_without_a_budget_nothing_is_restricted():
    policy = SlaPolicy(Bounds(1, 400, None), SlaParameters(step_window=1))
    assert policy.decide(observe(steps=[step(400, 1e9)])) == Decision(400, 2048, "cap")


def test_reasons():
    policy = by_hand(max_rows=16)
    assert policy.decide(observe()).reason == "latency"
    follow(policy, (8, 10), (11, 10), (13, 10))
    assert policy.decide(observe()).reason == "cap"


def run(
    budget_ms: float, max_rows: int, *, fixed_ms: float = 30.0, ms_a_row: float = 0.22
) -> tuple[list[float], Decision]:
    """Step times of a job whose rows end at random, with the paper's step time, 0.22*b + 30 ms (Fig. 3)."""
    rng = np.random.default_rng(3)
    policy = SlaPolicy(Bounds(1, max_rows, budget_ms))
    left = np.zeros(0, dtype=np.int64)
    latest, times = [], []
    for _ in range(2000):
        decision = policy.decide(observe([1] * len(left), steps=latest))
        admitted = min(20, max(0, decision.rows - len(left)))
        left = np.concatenate((left, rng.integers(1, 200, admitted))) - 1
        times.append(fixed_ms + ms_a_row * len(left))
        latest = [step(len(left), times[-1])]
        left = left[left > 0]
    return times, decision


@pytest.mark.parametrize("budget_ms", [50, 80])
def test_the_papers_step_time_comes_to_the_budget(budget_ms: float):
    times, decision = run(budget_ms, 1024)
    assert max(abs(ms - budget_ms) for ms in times[-500:]) <= budget_ms / 5
    assert max(times) > budget_ms * 6 / 5, "the start has to overshoot, or nothing was corrected"
    assert decision.reason == "latency"


def test_budget_below_one_row_is_reported_and_the_run_continues_at_one_row():
    times, decision = run(20, 1024)
    assert times[-100:] == [30.22] * 100
    assert decision == Decision(1, 2048, OVER_BUDGET)


def test_budget_that_one_row_keeps_is_not_reported():
    _, decision = run(30.5, 1024)
    assert decision.reason == "latency"


def test_over_budget_is_not_reported_for_steps_with_more_rows():
    policy = by_hand()
    reasons = []
    for rows, ms in [(20, 90), (11, 90), (8, 90), (6, 90), (3, 90), (1, 90), (1, 30)]:
        reasons.append(policy.decide(observe(steps=[step(rows, ms)])).reason)
    assert reasons == ["latency"] * 5 + [OVER_BUDGET, "latency"]


def test_over_budget_is_not_reported_while_the_target_is_higher():
    assert by_hand().decide(observe(steps=[step(1, 90)])).reason == "latency"  # [1, 21]


def test_over_budget_counts_from_the_budget_not_from_the_tolerance():
    policy = by_hand()
    reasons = [policy.decide(observe(steps=[step(1, ms)])).reason for ms in (50, 50.1, 49.9)]
    assert reasons == ["latency", OVER_BUDGET, "latency"]


@pytest.mark.parametrize(
    "parameters",
    [{"alpha": 0}, {"delta": -1}, {"epsilon_d": -0.5}, {"epsilon_d": math.nan}, {"step_window": 0}],
    ids=str,
)
def test_parameters_out_of_range_are_refused(parameters: dict):
    with pytest.raises(ValueError, match=f"{next(iter(parameters))} must be at least"):
        SlaPolicy(Bounds(), SlaParameters(**parameters))
