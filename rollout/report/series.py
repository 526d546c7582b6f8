"""Lines of metrics summed into bins of time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rollout.report.metric_lines import Line

FloatArray = NDArray[np.float64]
Counts = dict[float, float]
"""Steps by step time in milliseconds, rounded up. Counts may be fractions of a step that spans several bins."""

_LEVELS = ("live_rows", "paused_rows", "row_target", "kv_tokens", "kv_bytes", "max_kv_bytes")
_AMOUNTS = ("steps", "busy_ms", "new_tokens", "prefill_tokens", "rewards", "reward_sum")
_PEAKS = ("step_ms_max", "latency_budget_ms")


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits that the user set for an attempt; None where there is no limit."""

    latency_budget_ms: float | None = None
    max_kv_bytes: float | None = None


@dataclass(slots=True)
class Track:
    """The activity of one worker, or of all workers, in each bin. All arrays are [bins], or have bins last."""

    covered: FloatArray
    """Seconds that lines cover."""
    levels: FloatArray
    """Quantities at a time, multiplied by seconds."""
    amounts: FloatArray
    """Work done. A line over several bins is split between them, so a bin may hold a fraction of a token."""
    peaks: FloatArray
    """NaN where unknown."""
    preempted_rows: FloatArray
    out_of_memory: FloatArray
    """Failures of the allocator."""
    headroom: dict[str, FloatArray]
    """By memory: [2, bins] its headroom in bytes multiplied by seconds, and the seconds."""
    reasons: dict[str, FloatArray]
    """Steps by the reason of their decision."""
    finish_reasons: dict[str, FloatArray]
    """Finished samples by reason."""
    step_ms_counts: list[Counts]

    @classmethod
    def empty(cls, bins: int) -> Track:
        """Create a track without lines."""
        return cls(
            covered=np.zeros(bins),
            levels=np.zeros((len(_LEVELS), bins)),
            amounts=np.zeros((len(_AMOUNTS), bins)),
            peaks=np.full((len(_PEAKS), bins), np.nan),
            preempted_rows=np.zeros(bins),
            out_of_memory=np.zeros(bins),
            headroom={},
            reasons={},
            finish_reasons={},
            step_ms_counts=[{} for _ in range(bins)],
        )

    def level(self, name: str) -> FloatArray:
        """Return the mean of a level in each bin; NaN where the worker did not run.

        Args:
            name: ``live_rows``, ``paused_rows``, ``row_target``, ``kv_tokens``, ``kv_bytes`` or ``max_kv_bytes``.
        """
        return self._per_second(self.levels[_LEVELS.index(name)])

    def headroom_bytes(self) -> FloatArray:
        """Return the headroom in each bin: the mean of what the workers of one memory read, summed over memories."""
        means = [_ratio(total, seconds) for total, seconds in self.headroom.values()]
        known = ~np.isnan(means).all(axis=0)
        return np.where(known, np.nansum(means, axis=0), np.nan)

    def level_seconds(self, name: str) -> float:
        """Return a level integrated over time."""
        return float(self.levels[_LEVELS.index(name)].sum())

    def rate(self, name: str) -> FloatArray:
        """Return ``steps``, ``busy_ms``, ``new_tokens`` or ``prefill_tokens`` per second; NaN while not running."""
        return self._per_second(self.amounts[_AMOUNTS.index(name)])

    def peak(self, name: str) -> FloatArray:
        """Return ``step_ms_max`` or ``latency_budget_ms`` in each bin; NaN where unknown."""
        peaks: FloatArray = self.peaks[_PEAKS.index(name)]
        return peaks

    def step_ms(self, q: float) -> FloatArray:
        """Return a quantile of the step time in each bin; NaN where unknown."""
        return np.array([quantile(counts, q) for counts in self.step_ms_counts])

    def step_ms_mean(self) -> FloatArray:
        return self._mean("busy_ms", "steps")

    def reward_mean(self) -> FloatArray:
        """Return the mean reward of the samples that finished in each bin; NaN where none did."""
        return self._mean("reward_sum", "rewards")

    def _mean(self, amount: str, count: str) -> FloatArray:
        return _ratio(self.amounts[_AMOUNTS.index(amount)], self.amounts[_AMOUNTS.index(count)])

    def _per_second(self, values: FloatArray) -> FloatArray:
        return _ratio(values, self.covered)

    def add(self, line: Line, limits: Limits, starts: FloatArray, ends: FloatArray) -> None:
        """Add one line to the bins that it overlaps; a line after the last bin is ignored."""
        at = slice(np.searchsorted(ends, line.span.start, "right"), np.searchsorted(starts, line.span.end, "left"))
        overlap = np.minimum(ends[at], line.span.end) - np.maximum(starts[at], line.span.start)
        if not len(overlap):
            return
        share = overlap / overlap.sum()
        limit = math.nan if limits.max_kv_bytes is None else limits.max_kv_bytes
        levels = (line.live_rows, line.paused_rows, line.row_target, line.kv_tokens, line.kv_bytes, limit)
        tokens = (line.new_tokens, line.prefill_tokens)
        amounts = (line.steps, line.steps * line.step_ms, *tokens, line.rewards, line.reward_sum)
        budget = math.nan if limits.latency_budget_ms is None else limits.latency_budget_ms
        self.covered[at] += overlap
        self.levels[:, at] += np.outer(levels, overlap)
        headroom = self.headroom.setdefault(line.memory, np.zeros((2, len(starts))))
        headroom[:, at] += np.outer((max(0.0, line.headroom_bytes), 1.0), overlap)
        self.amounts[:, at] += np.outer(amounts, share)
        self.peaks[:, at] = np.fmax(self.peaks[:, at], np.array([[line.step_ms_max], [budget]]))
        self.preempted_rows[at.stop - 1] += line.preempted_rows  # not split, to stay whole
        self.out_of_memory[at.stop - 1] += line.out_of_memory_events
        for reason, steps in line.reasons.items():
            self.reasons.setdefault(reason, np.zeros(len(starts)))[at] += steps * share
        for reason, samples in line.finish_reasons.items():
            self.finish_reasons.setdefault(reason, np.zeros(len(starts)))[at] += samples * share
        for counts, part in zip(self.step_ms_counts[at], share.tolist(), strict=True):
            add_counts(counts, line.step_ms_counts, part)


def sum_tracks(tracks: Iterable[Track]) -> Track:
    """Combine workers: sum levels and amounts, take the maximum of peaks, count each memory's headroom once."""
    tracks = list(tracks)
    total = Track.empty(len(tracks[0].covered))
    for track in tracks:
        total.covered = np.maximum(total.covered, track.covered)
        total.levels += track.levels
        total.amounts += track.amounts
        total.peaks = np.fmax(total.peaks, track.peaks)
        total.preempted_rows += track.preempted_rows
        total.out_of_memory += track.out_of_memory
        for memory, headroom in track.headroom.items():
            total.headroom[memory] = total.headroom.get(memory, 0.0) + headroom
        for reason, steps in track.reasons.items():
            total.reasons[reason] = total.reasons.get(reason, 0.0) + steps
        for reason, samples in track.finish_reasons.items():
            total.finish_reasons[reason] = total.finish_reasons.get(reason, 0.0) + samples
        for counts, more in zip(total.step_ms_counts, track.step_ms_counts, strict=True):
            add_counts(counts, more)
    return total


def add_counts(total: Counts, more: Mapping[float, float], share: float = 1.0) -> None:
    """Add a share of each count to ``total``."""
    for value, count in more.items():
        total[value] = total.get(value, 0.0) + count * share


def quantile(counts: Mapping[float, float], q: float) -> float:
    """Return the smallest value that at least a share ``q`` of the counts does not exceed; NaN without counts."""
    left = q * sum(counts.values())
    value = math.nan
    for value in sorted(counts):
        left -= counts[value]
        if left <= 1e-9:  # fractions of steps do not sum exactly
            break
    return value


def share_above(counts: Mapping[float, float], bound: float) -> float:
    """Return the share of the counts above a bound; NaN without counts."""
    total = sum(counts.values())
    return sum(count for value, count in counts.items() if value > bound) / total if total else math.nan


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)
