from __future__ import annotations

import numpy as np
import pytest

from rollout.batcher.estimators.survival import EDGES, Survival, bins_of
from rollout.batcher.types import FinishedRow

NO_ROWS = np.zeros(0, np.int64)


def finished(*lengths: int, cut: bool = False) -> list[FinishedRow]:
    return [FinishedRow(100, length, cut) for length in lengths]


def survival(life_table: Survival, age: int, steps: float) -> float:
    return float(life_table.survival(np.array([steps]))[bins_of(np.array([age]))[0], 0])


def test_each_age_lies_within_its_bin():
    ages = np.array([0, 3, 4, 127, 128, 5000, 10**7])
    bins = bins_of(ages)
    inside = ages < EDGES[-1]
    assert (EDGES[bins][inside] <= ages[inside]).all()
    assert (ages[inside] < EDGES[bins + 1][inside]).all()
    assert bins[-1] == len(EDGES) - 2


def test_survival_follows_finished_lengths():
    life_table = Survival()
    lengths = np.random.default_rng(0).geometric(1 / 300, 4000)
    life_table.learn(finished(*lengths.tolist()))
    life_table.estimate(NO_ROWS, 4096)
    for age in (10, 200, 600):
        assert survival(life_table, age, 300) == pytest.approx(np.exp(-1), abs=0.06), "a geometric length has no memory"
    assert life_table.quantile(0.5) == pytest.approx(300 * np.log(2), rel=0.1)


def test_constant_lengths_end_in_one_bin():
    life_table = Survival()
    life_table.learn(finished(*[128] * 200))
    life_table.estimate(NO_ROWS, 512)
    assert survival(life_table, 20, 90) > 0.97
    assert survival(life_table, 20, 130) < 0.02


def test_live_rows_count_as_censored():
    """Of rows of 100 and 1,000 tokens only short ones have ended; the others are known to go on."""
    lives, finished_only = Survival(), Survival()
    for life_table in (lives, finished_only):
        life_table.learn(finished(*[100] * 50))
    lives.estimate(np.full(50, 500), 4096)
    finished_only.estimate(NO_ROWS, 4096)
    assert survival(lives, 50, 100) == pytest.approx(0.5, abs=0.05)
    assert survival(finished_only, 50, 100) < 0.05


def test_rows_cut_at_their_limit_count_as_censored():
    cut, ended = Survival(), Survival()
    cut.learn(finished(*[100] * 50) + finished(*[512] * 50, cut=True))
    ended.learn(finished(*[100] * 50) + finished(*[512] * 50))
    for life_table in (cut, ended):
        life_table.estimate(NO_ROWS, 4096)
    assert survival(cut, 500, 40) > 0.5 > survival(ended, 500, 40)
    assert cut.finished == pytest.approx(50, rel=0.02)


def test_survival_without_rows_is_the_prior():
    life_table = Survival()
    life_table.estimate(NO_ROWS, 1600)
    assert life_table.quantile(0.5) == pytest.approx(100, rel=0.5)
    assert 0.3 < survival(life_table, 1000, 1100) < 0.7, "what has lasted long goes on as long again"


def test_survival_follows_a_drift():
    life_table = Survival(memory_rows=200)
    life_table.learn(finished(*[100] * 1000))
    life_table.learn(finished(*[800] * 1000))
    life_table.estimate(NO_ROWS, 4096)
    assert life_table.quantile(0.05) > 700
    assert life_table.finished < 210
