"""The time of a run from left to right, without the time in which nothing ran."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import timedelta

import numpy as np

from rollout.report.metric_lines import Span
from rollout.report.series import FloatArray

WIDTH = 960
"""Of a chart."""
LEFT, RIGHT = 74, 950
"""The plot's edges; the other axis stands left of it."""
_GAP = 24
"""Width of a pause, which is not to scale."""
_MOST_GAPS = 0.35
"""Share of the plot that pauses may take together."""
_TICK_SECONDS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800] + [3600 * h for h in (1, 2, 3, 6, 12, 24, 48, 168)]


class TimeAxis:
    """The time in which a run ran, from left to right; pauses are narrow and grey.

    Args:
        spans: when it ran, in order and apart from each other.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.begin = spans[0].start
        gap = min(_GAP, _MOST_GAPS * (RIGHT - LEFT) / max(1, len(spans) - 1))
        scale = (RIGHT - LEFT - gap * (len(spans) - 1)) / sum(span.seconds for span in spans)
        times, xs = [], []
        x = float(LEFT)
        for span in spans:
            times += [span.start, span.end]
            xs += [x, x + scale * span.seconds]
            x = xs[-1] + gap
        self._times, self._xs = np.array(times), np.array(xs)
        self._scale = scale

    def x(self, times: FloatArray | float) -> FloatArray:
        """Where times are."""
        xs: FloatArray = np.interp(times, self._times, self._xs)
        return xs

    def pauses(self) -> Iterator[tuple[float, float, float]]:
        """Left and right edge of each, and its seconds."""
        for i in range(1, len(self.spans)):
            yield self._xs[2 * i - 1], self._xs[2 * i], self.spans[i].start - self.spans[i - 1].end

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Where round times since the start are, and what they are called; so many as can be read."""
        step = next((s for s in _TICK_SECONDS if s * self._scale >= 80), _TICK_SECONDS[-1])
        last = -math.inf
        for span in self.spans:
            first, until = (math.ceil((t - self.begin) / step) for t in (span.start, span.end))
            # A run of years at a second a tick would take as long to list.
            for k in range(first, min(until, first + WIDTH)):
                x = float(self.x(self.begin + k * step))
                if x - last >= 60:
                    yield x, clock(k * step)
                    last = x


def clock(seconds: float) -> str:
    """A duration as days, hours, minutes and seconds, e.g. ``1:05`` or ``2 days, 3:00:00``."""
    text = str(timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0") if seconds < 3600 else text
