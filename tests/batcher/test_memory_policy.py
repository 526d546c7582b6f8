from __future__ import annotations

import numpy as np
import pytest

from rollout.batcher.estimators.length_moments import Moments
from rollout.batcher.policies.memory import MemoryParameters, MemoryPolicy, rows_by_buffer, rows_by_eq12
from rollout.batcher.types import Bounds, FinishedRow
from tests.support.observations import observe

# paper.md, section 2: mu = 573 and sigma = 350 a row.
PAPER = Moments(prompt_mean=191, prompt_variance=0, output_mean=382, output_variance=350**2)
ETA = 100_000
THETA = 1.645

# With these behind it, a policy charges 200 tokens a row, without variance.
ROWS_OF_200 = [FinishedRow(100, 100)] * 50


def test_equation_12_gives_known_answer_of_the_paper():
    assert rows_by_eq12(ETA, PAPER, THETA) == 161


def test_equation_12_is_the_largest_batch_within_memory():
    def charged(rows: int) -> float:
        return PAPER.mean * rows + THETA * PAPER.sd * np.sqrt(rows)

    for eta in (1, 573, 1149, 5_000, ETA, 10_000_000):
        rows = rows_by_eq12(eta, PAPER, THETA)
        assert charged(rows) <= eta < charged(rows + 1)


def test_equation_12_overflows_as_often_as_accepted():
    rng = np.random.default_rng(12)

    def overflows(rows: int) -> float:
        sums = rng.normal(PAPER.mean, PAPER.sd, (20_000, rows)).sum(axis=1)
        return float((sums > ETA).mean())

    rows = rows_by_eq12(ETA, PAPER, THETA)
    assert overflows(rows) < 0.05 < overflows(rows + 2)


def test_without_variance_equation_12_divides():
    assert rows_by_eq12(10_000, Moments(100, 0, 100, 0), THETA) == 50


@pytest.mark.parametrize("eta", [0, -1000])
def test_equation_12_without_memory_is_zero_rows(eta: int):
    assert rows_by_eq12(eta, PAPER, THETA) == 0


def test_the_buffer_form_converges_to_equation_12():
    rows, seen = 100, []
    for _ in range(4):
        rows = rows_by_buffer(ETA, PAPER, THETA, rows)
        seen.append(rows)
    # (100000 - 1.645*350*sqrt(100)) / 573 = 164.47, then with sqrt(164): 161.65
    assert seen == [164, 161, 161, 161]


@pytest.mark.parametrize("form", ["eq12", "buffer"])
def test_rows_fill_memory_at_their_final_lengths(form: str):
    decision = MemoryPolicy(Bounds(), MemoryParameters(form=form)).decide(
        observe([1] * 10, eta=10_000, finished=ROWS_OF_200)
    )
    assert (decision.rows, decision.reason) == (50, "memory")


def test_forms_differ_where_lengths_vary():
    finished = [FinishedRow(100, 50), FinishedRow(100, 150)] * 50
    seen = observe([1] * 10, eta=10_000, finished=finished)
    rows = {
        form: MemoryPolicy(Bounds(max_rows=100), MemoryParameters(form=form)).decide(seen).rows
        for form in ("eq12", "buffer")
    }
    # mu 200, sigma 50, theta 1.645 and, for the buffer, b_{t-1} = max_rows = 100.
    assert rows == {"eq12": 47, "buffer": 45}


def test_lengths_are_estimated_again_every_16_refreshes_and_memory_is_read_at_each():
    policy = MemoryPolicy(Bounds())
    seen = observe([1], eta=10_000)
    assert policy.decide(observe([1], eta=10_000, finished=ROWS_OF_200)).rows == 50
    longer = observe([1], eta=8_000, finished=[FinishedRow(100, 300)] * 10_000)
    assert policy.decide(longer).rows == 40
    assert [policy.decide(seen).rows for _ in range(15)] == [50] * 14 + [25]


def test_a_smaller_accepted_overflow_means_fewer_rows():
    finished = [FinishedRow(100, 50), FinishedRow(100, 150)] * 50
    seen = observe([1] * 10, eta=10_000, finished=finished)
    # theta = 2.326
    assert MemoryPolicy(Bounds(), MemoryParameters(epsilon_m=0.01)).decide(seen).rows == 46


def test_at_a_cold_start_a_row_costs_its_prompt_and_half_of_its_limit_and_the_spread():
    decision = MemoryPolicy(Bounds(), MemoryParameters(epsilon_m=0.5)).decide(
        observe([1], prompt=100, max_new=399, eta=30_000)
    )
    # theta = 0 and mu = 100 + (1 + 399)/2
    assert decision.rows == 100


def test_the_first_size_is_the_cap_and_holds_until_rows_decode():
    policy = MemoryPolicy(Bounds(max_rows=77))
    for generated in ([], [0, 0]):
        decision = policy.decide(observe(generated, eta=1000))
        assert (decision.rows, decision.reason) == (77, "hold")


def test_the_last_size_holds_while_nothing_waits_for_prefill():
    policy = MemoryPolicy(Bounds())
    policy.decide(observe([1] * 10, eta=10_000, finished=ROWS_OF_200))
    held = policy.decide(observe([2] * 10, eta=2_000, waiting=0))
    assert (held.rows, held.reason) == (50, "hold")
    # A live row without a token is still in prefill: N^p is 1 again.
    refreshed = policy.decide(observe([3] * 9 + [0], eta=2_000, waiting=0))
    assert (refreshed.rows, refreshed.reason) == (10, "memory")


def test_rows_in_decode_are_kept_but_rows_in_prefill_are_not():
    decision = MemoryPolicy(Bounds()).decide(observe([1] * 60 + [0] * 10, eta=10_000, finished=ROWS_OF_200))
    assert (decision.rows, decision.reason) == (60, "running")


def test_bounds_go_before_memory_and_before_running_rows():
    seen = observe([1] * 60, eta=10_000, finished=ROWS_OF_200)
    capped = MemoryPolicy(Bounds(max_rows=20)).decide(seen)
    assert (capped.rows, capped.reason) == (20, "cap")
    assert MemoryPolicy(Bounds(min_rows=90)).decide(seen).rows == 90


@pytest.mark.parametrize(
    ("parameters", "named"),
    [({"epsilon_m": 0.0}, "epsilon_m"), ({"epsilon_m": 1.0}, "epsilon_m"), ({"form": "eq13"}, "buffer, eq12")],
)
def test_parameters_out_of_range_are_refused(parameters: dict, named: str):
    with pytest.raises(ValueError, match=named):
        MemoryPolicy(Bounds(), MemoryParameters(**parameters))


def test_recurrent_state_is_charged_per_row():
    seen = observe([1] * 10, eta=10_000, finished=ROWS_OF_200, tokens_per_row=300)
    assert MemoryPolicy(Bounds()).decide(seen).rows == 10_000 / (200 + 300)
