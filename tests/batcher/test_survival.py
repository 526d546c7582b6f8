from __future__ import annotations

import numpy as np
import pytest

from rollout.batcher.estimators.survival import EDGES, Survival, bins_of
from rollout.batcher.types import FinishedRow

NOBODY = np.zeros(0, np.int64)


def finished(*lengths: int, cut: bool = False) -> list[FinishedRow]:
    return [FinishedRow(100, length, cut) for length in lengths]


def survival(hazard: Survival, age: int, steps: float) -> float:
    return float(hazard.survival(np.array([steps]))[bins_of(np.array([age]))[0], 0])


def test_bins_hold_their_ages():
    ages = np.array([0, 3, 4, 127, 128, 5000, 10**7])
    bins = bins_of(ages)
    inside = ages < EDGES[-1]
    assert (EDGES[bins][inside] <= ages[inside]).all()
    assert (ages[inside] < EDGES[bins + 1][inside]).all()
    assert bins[-1] == len(EDGES) - 2


def test_what_ended_is_learned():
    hazard = Survival()
    lengths = np.random.default_rng(0).geometric(1 / 300, 4000)
    hazard.learn(finished(*lengths.tolist()))
    hazard.estimate(NOBODY, 4096)
    for age in (10, 200, 600):
        assert survival(hazard, age, 300) == pytest.approx(np.exp(-1), abs=0.06), "a geometric length has no memory"
    assert hazard.quantile(0.5) == pytest.approx(300 * np.log(2), rel=0.1)


def test_constant_lengths_end_all_at_once():
    hazard = Survival()
    hazard.learn(finished(*[128] * 200))
    hazard.estimate(NOBODY, 512)
    assert survival(hazard, 20, 90) > 0.97
    assert survival(hazard, 20, 130) < 0.02


def test_running_rows_are_lives_that_are_not_over():
    """Of rows of 100 and 1,000 tokens only short ones have ended; the others are known to go on."""
    lives, deaf = Survival(), Survival()
    for hazard in (lives, deaf):
        hazard.learn(finished(*[100] * 50))
    lives.estimate(np.full(50, 500), 4096)
    deaf.estimate(NOBODY, 4096)
    assert survival(lives, 50, 100) == pytest.approx(0.5, abs=0.05)
    assert survival(deaf, 50, 100) < 0.05


def test_rows_cut_at_their_limit_did_not_end():
    cut, ended = Survival(), Survival()
    cut.learn(finished(*[100] * 50) + finished(*[512] * 50, cut=True))
    ended.learn(finished(*[100] * 50) + finished(*[512] * 50))
    for hazard in (cut, ended):
        hazard.estimate(NOBODY, 4096)
    assert survival(cut, 500, 40) > 0.5 > survival(ended, 500, 40)
    assert cut.finished == pytest.approx(50, rel=0.02)


def test_nothing_known_is_the_prior():
    hazard = Survival()
    hazard.estimate(NOBODY, 1600)
    assert hazard.quantile(0.5) == pytest.approx(100, rel=0.5)
    assert 0.3 < survival(hazard, 1000, 1100) < 0.7, "what has lasted long goes on as long again"


def test_a_drift_is_followed():
    hazard = Survival(memory_rows=200)
    hazard.learn(finished(*[100] * 1000))
    hazard.learn(finished(*[800] * 1000))
    hazard.estimate(NOBODY, 4096)
    assert hazard.quantile(0.05) > 700
    assert hazard.finished < 210
