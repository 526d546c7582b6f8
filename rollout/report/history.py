"""The metrics of a run over time: all workers and attempts, in bins of the time in which any worker ran."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from rollout.report.metric_lines import Line, Span, lines_of
from rollout.report.series import Counts, FloatArray, Limits, Track, add_counts
from rollout.run_dir.paths import RunPaths
from rollout.tracking.step_metrics import LINE_SECONDS

MOST_BINS = 480
"""A bin is at least two pixels of a chart, and at least one line of metrics."""
PAUSE_SECONDS = 5.0
"""A gap this long between lines is a pause: workers write every second, and a line covers all of a longer step."""


@dataclass(slots=True)
class Activity:
    """Totals of one attempt."""

    spans: list[Span] = field(default_factory=list)
    """The times in which any of its workers ran."""
    workers: set[int] = field(default_factory=set)
    steps: float = 0.0
    new_tokens: float = 0.0
    prefill_tokens: float = 0.0
    preempted_rows: float = 0.0
    out_of_memory_events: float = 0.0
    step_ms_counts: Counts = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(span.seconds for span in self.spans)

    def add(self, line: Line) -> None:
        """Add one line of the attempt."""
        self.workers.add(line.worker)
        self.steps += line.steps
        self.new_tokens += line.new_tokens
        self.prefill_tokens += line.prefill_tokens
        self.preempted_rows += line.preempted_rows
        self.out_of_memory_events += line.out_of_memory_events
        add_counts(self.step_ms_counts, line.step_ms_counts)


@dataclass(frozen=True, slots=True)
class History:
    """The metrics of a run; without spans, bins and tracks if there are none."""

    spans: list[Span]
    """The times in which any worker ran."""
    starts: FloatArray
    """[bins] seconds since 1970; each bin lies in one span, and bins cover each span."""
    ends: FloatArray
    tracks: dict[int, Track]
    """By worker."""
    attempts: dict[int, Activity]
    unreadable: int
    """Number of lines that are torn or not metrics."""


def read_history(paths: RunPaths, limits: Mapping[int, Limits]) -> History:
    """Read the metrics of a run, which may still be running.

    The files are read twice, once for the times and once for the values, and never held in memory: a day of eight
    workers would take a gigabyte.

    Args:
        limits: by attempt.
    """
    spans: defaultdict[tuple[int, int], list[Span]] = defaultdict(list)
    attempts: defaultdict[int, Activity] = defaultdict(Activity)
    unreadable = 0
    for line in lines_of(paths):
        if line is None:
            unreadable += 1
            continue
        _join(spans[line.worker, line.attempt], line.span)
        attempts[line.attempt].add(line)
    for attempt, activity in attempts.items():
        activity.spans = _union(span for key, own in spans.items() if key[1] == attempt for span in own)
    ran = _union(span for own in spans.values() for span in own)
    starts, ends = _bins(ran)
    tracks = {worker: Track.empty(len(starts)) for worker in sorted({worker for worker, _ in spans})}
    for line in lines_of(paths):
        if line is not None and line.worker in tracks:
            tracks[line.worker].add(line, limits.get(line.attempt, Limits()), starts, ends)
    return History(
        spans=ran,
        starts=starts,
        ends=ends,
        tracks=tracks,
        attempts=dict(sorted(attempts.items())),
        unreadable=unreadable,
    )


def _join(spans: list[Span], new: Span) -> None:
    """Append a span, or merge it into the last one if no pause lies between; spans come in order of time."""
    if spans and spans[-1].start <= new.start <= spans[-1].end + PAUSE_SECONDS:
        spans[-1] = Span(spans[-1].start, max(spans[-1].end, new.end))
    else:
        spans.append(new)


def _union(spans: Iterable[Span]) -> list[Span]:
    joined: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start):
        _join(joined, span)
    return joined


def _bins(spans: list[Span]) -> tuple[FloatArray, FloatArray]:
    """Return the starts and ends of the bins, each [bins]."""
    width = max(LINE_SECONDS, sum(span.seconds for span in spans) / MOST_BINS)
    if not spans:
        return np.empty(0), np.empty(0)
    edges = [np.linspace(span.start, span.end, max(1, round(span.seconds / width)) + 1) for span in spans]
    return np.concatenate([edge[:-1] for edge in edges]), np.concatenate([edge[1:] for edge in edges])
