"""Estimate the time that a job still takes, from the lengths and step times that it has shown so far."""

from __future__ import annotations

import heapq
from collections import deque
from typing import NamedTuple

import numpy as np

from rollout.batcher.estimators.length_posterior import LengthPosterior
from rollout.batcher.estimators.step_time import Coefficients, StepTime
from rollout.batcher.types import FinishedRow, FloatArray, Observation, StepSample, ceil_div

#: Steps, and their time in milliseconds, before which nothing is foretold.
_FIRST_STEPS, _FIRST_MS = 4, 1000.0
#: Samples of step times that one estimate learns from; steps in between are averaged.
_SAMPLES_PER_ESTIMATE = 8
#: Waiting rows that are simulated one by one, in batches; the others go at the rate of a full batch.
_SIMULATED_BATCHES = 4
#: The steps of this last time tell how much slower the job is than the fit; other processes come and go.
_RECENT_MS = 60_000.0
_TYPICAL_ROWS = 512
#: Nothing is foretold while thinkable lengths differ so much that the longer ones take this much longer.
_QUANTILES, _GREATEST_SPREAD = (0.25, 0.5, 0.75), 2.5
_DISTINCT_STEPS = 256
_WEIGHTS_MS, _PRIOR_STEPS = 40.0, 0.05
_GOLDEN = 0.6180339887498949


class _Rows(NamedTuple):
    """Simulated rows: the steps in which each is live, and its context when it begins; arrays of equal length."""

    starts: FloatArray
    ends: FloatArray
    contexts: FloatArray


class _Window(NamedTuple):
    """Steps between two estimates: groups of so many steps, each like its sample."""

    now_ms: float
    """When they had run."""
    counts: list[int]
    samples: list[StepSample]


class TimeLeft:
    """Predicts the remaining time by playing the rest of the job forward.

    Live rows get lengths from the survival estimate given their age, and waiting rows get lengths from the whole
    estimate. Both are cut at ``max_new_tokens``. Short rows finish first, so the mean of finished rows alone would be
    too small; the survival estimate counts the live rows as well. A row that ends makes room for one that waits. The
    time of a step follows from its rows and their contexts, so the last rows, which run in a small batch, cost more
    time per token.

    There is no clock: the caller says what time it is. Whatever else takes time between steps, or makes all of them
    slower than the fit says, scales the prediction.
    """

    def __init__(self) -> None:
        self._lengths = LengthPosterior()
        self._step_time = StepTime()
        self._steps: list[StepSample] = []
        self._finished: list[FinishedRow] = []
        self._last: Observation | None = None
        self._row_target = 0
        self._recent_rows: deque[int] = deque(maxlen=64)
        """Live rows of the last steps in which rows waited and none was in prefill."""
        self._seen_steps = 0
        self._seen_ms = 0.0
        self._windows: deque[_Window] = deque()
        self._prefilled = 0
        self._ended = 0

    def observe(self, observation: Observation, row_target: int) -> None:
        """Add what a policy observed, and the rows that it allowed."""
        self._last, self._row_target = observation, row_target
        self._steps += observation.steps
        self._finished += observation.finished
        if observation.waiting_rows and observation.steps and not observation.steps[-1].prefill_tokens:
            self._recent_rows.append(observation.live_rows)

    def milliseconds(self, waiting: float, now_ms: float) -> float | None:
        """Return the time that the live rows and ``waiting`` further rows take; None before there is evidence."""
        enough = self._seen_steps >= _FIRST_STEPS and self._seen_ms >= _FIRST_MS
        self._learn(now_ms)
        last = self._last
        if not enough or last is None or not last.live_rows:
            return None
        self._lengths.estimate(last.generated_tokens, float(last.max_new_tokens.mean()))
        shorter, middle, longer = (self._play(last, waiting, quantile) for quantile in _QUANTILES)
        return middle * self._slowness() if longer <= _GREATEST_SPREAD * shorter else None

    def _learn(self, now_ms: float) -> None:
        steps, self._steps = self._steps, []
        self._seen_steps += len(steps)
        self._seen_ms += sum(step.ms for step in steps)
        self._prefilled += sum(step.prefill_tokens for step in steps)
        # The first steps differ most in their rows, which tells the cost of a row from that of a step.
        first = self._seen_steps <= _DISTINCT_STEPS
        size = 1 if first else max(1, ceil_div(len(steps), _SAMPLES_PER_ESTIMATE))
        groups = [steps[i : i + size] for i in range(0, len(steps), size)]
        samples = [_mean(group) for group in groups]
        self._step_time.learn(samples)
        self._windows.append(_Window(now_ms, [len(group) for group in groups], samples))
        while len(self._windows) > 2 and self._windows[1].now_ms <= now_ms - _RECENT_MS:
            self._windows.popleft()
        finished, self._finished = self._finished, []
        self._ended += len(finished)
        self._lengths.learn(finished)

    def _slowness(self) -> float:
        """Return the time that passed since the first of the recent estimates, by the time that the fit gives it."""
        first, *rest = self._windows
        fitted = sum(
            count * self._step_time.predict(sample.rows, sample.kv_tokens, sample.prefill_tokens)
            for window in rest
            for count, sample in zip(window.counts, window.samples, strict=True)
        )
        return (self._windows[-1].now_ms - first.now_ms) / fitted if fitted else 1.0

    def _play(self, last: Observation, waiting: float, quantile: float) -> float:
        """Return the time of the rest of the job, for lengths at a quantile of what is thinkable."""
        costs = self._costs(last)
        self._lengths.select(quantile)
        capacity = max(1, last.live_rows, max(self._recent_rows, default=self._row_target))
        near = min(round(waiting), _SIMULATED_BATCHES * capacity)
        prefill_per_row = self._prefilled / (self._ended + last.live_rows)
        further = (waiting - near) * self._full_batch_ms(last, costs, capacity)
        prefill = waiting * prefill_per_row * costs.prefill_token
        return _decoding_ms(self._rows(last, near, capacity), costs) + further + prefill

    def _costs(self, last: Observation) -> Coefficients:
        """Return the costs of a step, supposing a time of a single row's until small batches have been seen.

        Steps of some ten milliseconds mostly read weights, whatever their rows; longer ones mostly calculate.
        """
        context = int(last.prompt_tokens.mean() + last.generated_tokens.mean())
        full_ms = max(self._step_time.predict(last.live_rows, context * last.live_rows, 0), 1e-3)
        alone_ms = full_ms / (1 + full_ms / _WEIGHTS_MS)
        alone = StepSample(rows=1, kv_tokens=context, prefill_tokens=0, ms=alone_ms)
        return self._step_time.with_prior(alone, _PRIOR_STEPS)

    def _rows(self, last: Observation, waiting: int, capacity: int) -> _Rows:
        """Give each row a length, and each waiting row the step in which another makes room for it."""
        limits = last.max_new_tokens.astype(np.float64)
        ages = last.generated_tokens.astype(np.float64)
        left = np.maximum(self._lengths.lengths(_spread(len(ages)), ages), ages + 1)
        left = np.maximum(np.minimum(left, limits) - ages, 1.0)
        lengths = self._lengths.lengths(_spread(waiting), np.zeros(waiting))
        lengths = np.clip(lengths, 1.0, limits[np.arange(waiting) % len(limits)])
        starts = np.empty(waiting)
        slots = left.tolist() + [0.0] * (capacity - len(left))
        heapq.heapify(slots)
        for i, length in enumerate(lengths.tolist()):
            starts[i] = slots[0]
            heapq.heapreplace(slots, slots[0] + length)
        prompts = last.prompt_tokens.astype(np.float64)
        return _Rows(
            starts=np.concatenate([np.zeros(len(left)), starts]),
            ends=np.concatenate([left, starts + lengths]),
            contexts=np.concatenate([prompts + ages, np.full(waiting, prompts.mean())]),
        )

    def _full_batch_ms(self, last: Observation, costs: Coefficients, capacity: int) -> float:
        """Return the decoding time per row of a full batch whose rows have all ages."""
        lengths = self._lengths.lengths(_spread(_TYPICAL_ROWS), np.zeros(_TYPICAL_ROWS))
        lengths = np.clip(lengths, 1.0, float(last.max_new_tokens.max()))
        mean = float(lengths.mean())
        age = float((lengths**2).mean()) / (2 * mean)
        step = costs.step + capacity * (costs.row + costs.kv_token * (float(last.prompt_tokens.mean()) + age))
        return step * mean / capacity


def _mean(steps: list[StepSample]) -> StepSample:
    count = len(steps)
    return StepSample(
        rows=round(sum(step.rows for step in steps) / count),
        kv_tokens=round(sum(step.kv_tokens for step in steps) / count),
        prefill_tokens=round(sum(step.prefill_tokens for step in steps) / count),
        ms=sum(step.ms for step in steps) / count,
    )


def _spread(count: int) -> FloatArray:
    """[count] numbers in (0, 1), evenly spread in any stretch of them."""
    order = np.argsort((np.arange(count) * _GOLDEN) % 1.0)
    spread = np.empty(count)
    spread[order] = (np.arange(count) + 0.5) / count
    return spread


def _decoding_ms(rows: _Rows, costs: Coefficients) -> float:
    """Return the time of all steps in which a row is live, by the rows and their contexts in each."""
    starts, ends = np.sort(rows.starts), np.argsort(rows.ends)
    order = np.argsort(rows.starts)
    # Between two events the batch has the same rows, so its size and its contexts follow from sums over the rows.
    events = np.unique(np.concatenate([rows.starts, rows.ends]))
    begun = np.searchsorted(starts, events[:-1], side="right")
    over = np.searchsorted(rows.ends[ends], events[:-1], side="right")
    live = begun - over
    middles = (events[:-1] + events[1:]) / 2
    offset = rows.contexts - rows.starts
    sums = np.concatenate([[0.0], np.cumsum(offset[order])])[begun]
    sums = sums - np.concatenate([[0.0], np.cumsum(offset[ends])])[over]
    kv_tokens = sums + live * middles
    per_step = np.where(live > 0, costs.step + costs.row * live + costs.kv_token * kv_tokens, 0.0)
    return float(per_step @ np.diff(events))
