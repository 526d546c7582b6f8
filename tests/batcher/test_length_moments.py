from __future__ import annotations

import numpy as np
import pytest

from rollout.batcher.estimators.length_moments import LengthMoments
from rollout.batcher.types import FinishedRow
from tests.support.observations import observe


def outputs(*lengths: int, prompt: int = 100) -> list[FinishedRow]:
    return [FinishedRow(prompt, length) for length in lengths]


def estimate(finished: list[FinishedRow], ages: list[int], max_new: int) -> tuple[float, float]:
    lengths = LengthMoments()
    lengths.learn(finished)
    moments = lengths.estimate(observe(ages, max_new=max_new))
    return moments.output_mean, moments.output_variance


def test_new_rows_count_as_half_of_their_limit_before_any_finish():
    mean, variance = estimate([], [0, 0, 0], max_new=512)
    assert mean == 256
    assert variance == pytest.approx(512**2 / 12)


def test_age_is_lower_bound_of_length_before_any_finish():
    assert estimate([], [400, 400], max_new=512)[0] == 456


def test_finished_rows_alone_give_their_plain_moments():
    lengths = LengthMoments()
    lengths.learn([FinishedRow(10, 2), FinishedRow(20, 4), FinishedRow(60, 9)])
    moments = lengths.estimate(observe())
    assert (moments.prompt_mean, moments.prompt_variance) == pytest.approx((30, np.var([10, 20, 60])))
    assert (moments.output_mean, moments.output_variance) == pytest.approx((5, np.var([2, 4, 9])))
    assert moments.mean == pytest.approx(35)
    assert moments.sd == pytest.approx(np.sqrt(np.var([10, 20, 60]) + np.var([2, 4, 9])))


def test_a_live_row_passes_its_weight_to_the_longer_finished_ones():
    # Kaplan-Meier by hand: 1/3 of the weight on 2; the row of age 3 leaves its third to 4.
    assert estimate(outputs(2, 4), [3], max_new=9) == pytest.approx((10 / 3, 8 / 9))


def test_a_live_row_older_than_all_finished_ones_is_uniform_up_to_its_limit():
    # 2, 4 and uniform(6, 10), which has mean 8 and variance 4/3, at a third each.
    assert estimate(outputs(2, 4), [6], max_new=10) == pytest.approx((14 / 3, 20 / 3))


def test_a_live_row_as_old_as_a_finished_one_counts_as_longer():
    assert estimate(outputs(5), [5], max_new=7)[0] == pytest.approx((5 + 6) / 2)


def test_a_row_at_its_limit_counts_with_that_length():
    assert estimate(outputs(2), [8], max_new=8)[0] == pytest.approx(5)


def test_rows_outside_the_window_are_forgotten():
    lengths = LengthMoments(length_window=3)
    lengths.learn(outputs(1000, 1000, 1000, 1000))
    lengths.learn(outputs(10, 20, 30, prompt=7))
    moments = lengths.estimate(observe())
    assert (moments.prompt_mean, moments.output_mean) == (7, 20)


def test_estimates_are_not_biased_by_short_rows_finishing_first():
    rng = np.random.default_rng(20250307)
    lengths = rng.integers(1, 201, 2000)
    ages = rng.integers(0, 201, 2000)
    done = lengths <= ages
    learned = LengthMoments(length_window=4000)
    learned.learn(outputs(*lengths[done]))
    moments = learned.estimate(observe([int(age) for age in ages[~done]], max_new=200))
    assert lengths[done].mean() < 80, "finished rows alone must mislead here, or this shows nothing"
    assert moments.output_mean == pytest.approx(lengths.mean(), rel=0.05)
    assert moments.output_variance == pytest.approx(lengths.var(), rel=0.1)


def test_estimate_without_rows_raises():
    with pytest.raises(ValueError, match="before the first row is live"):
        LengthMoments().estimate(observe())


def test_window_below_one_raises():
    with pytest.raises(ValueError, match="length_window must be at least 1"):
        LengthMoments(length_window=0)
