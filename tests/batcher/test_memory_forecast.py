"""Forecasts of many rows at once against those of each alone."""

from __future__ import annotations

import numpy as np
import pytest

from rollout.batcher.estimators.memory_forecast import MemoryForecaster
from rollout.batcher.estimators.row_memory import RowMemory
from rollout.batcher.estimators.survival import Survival
from rollout.batcher.types import FinishedRow


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 6, 300])
def test_total_is_sum_of_per_row_forecasts(count: int, seed: int) -> None:
    print("seed", seed)
    rng = np.random.default_rng(seed)
    survival = Survival()
    survival.learn([FinishedRow(10, int(length)) for length in rng.integers(1, 300, 200)])
    survival.estimate(rng.integers(0, 300, 50), 300)
    forecast = MemoryForecaster(survival, np.linspace(0, 400, 40))
    ages = rng.integers(0, 300, count)
    limits = ages + rng.choice([1, 7, 200, 399, 400, 401, 5000], count)
    rows = RowMemory(500 * rng.random(count), ages, limits, rng.random(count) < 0.2)
    together, alone = forecast.total(rows), forecast.per_row(rows)
    np.testing.assert_allclose(together.mean, alone.mean.sum(0))
    np.testing.assert_allclose(together.variance, alone.variance.sum(0), atol=1e-6)
    np.testing.assert_allclose(together.without_exits, alone.without_exits.sum(0))
