"""Forecast how long a worker's samples take, from the steps and the lengths that it has seen."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rollout.batcher.estimators.length_posterior import LengthPosterior
from rollout.batcher.estimators.step_time import StepTime
from rollout.batcher.types import FloatArray, IntArray
from rollout.job.shares import OpenSample, Speed
from rollout.requests import StepReport
from rollout.run_dir.record_lines import SampleKey
from rollout.stop_conditions import UnfinishedSample

_SPREADS = (np.arange(8) + 0.5) / 8
"""Shares of the rows of an age at which lengths are averaged."""


class WorkForecast:
    """Learns the speed of this worker and the lengths of its samples."""

    def __init__(self) -> None:
        self._step_time = StepTime()
        self._lengths = LengthPosterior()
        self._most_rows = 1
        self._max_new_tokens = 1.0
        self._context = 0.0

    def step(self, report: StepReport) -> None:
        """Learn from a step."""
        seen = report.observation
        self._step_time.learn(seen.steps)
        if seen.finished:
            self._lengths.learn(seen.finished)
        self._most_rows = max(self._most_rows, report.live_rows)

    @property
    def speed(self) -> Speed:
        """Return the speed at which this worker generates; unknown before its first steps."""
        return Speed.of(self._step_time.coefficients, self._most_rows)

    def begun(self, unfinished: Iterable[UnfinishedSample]) -> list[OpenSample]:
        """Return the samples of a call, those that were read last in front."""
        samples = list(unfinished)[::-1]
        if not samples:
            return []
        ages = np.array([sample.generated_tokens for sample in samples], np.int64)
        limits = np.array([sample.max_new_tokens for sample in samples], np.float64)
        self._max_new_tokens = float(limits.mean())
        self._context = float(np.mean([sample.prompt_tokens for sample in samples]))
        self._lengths.estimate(ages[ages > 0], self._max_new_tokens)
        return [
            OpenSample(
                key=SampleKey(sample.row_id, sample.sample),
                context=sample.prompt_tokens + sample.generated_tokens,
                rest=rest,
                begun=sample.computed,
            )
            for sample, rest in zip(samples, self._rests(ages, limits).tolist(), strict=True)
        ]

    def unread(self, keys: Iterable[SampleKey]) -> list[OpenSample]:
        """Return samples that the engine has not read, like those that it last had."""
        rest = float(self._rests(np.zeros(1, np.int64), np.array([self._max_new_tokens]))[0])
        return [OpenSample(key, context=int(self._context), rest=rest, begun=False) for key in keys]

    def _rests(self, ages: IntArray, limits: FloatArray) -> FloatArray:
        """[samples] Return the mean tokens that samples of these ages still generate."""
        at = ages.astype(np.float64)
        lengths = np.mean(
            [np.minimum(self._lengths.lengths(np.full(len(at), spread), at), limits) for spread in _SPREADS], axis=0
        )
        rests: FloatArray = np.maximum(1.0, lengths - at)
        return rests
