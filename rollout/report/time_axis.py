"""The time axis of a run, in which pauses are narrow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import timedelta

import numpy as np

from rollout.report.metric_lines import Span
from rollout.report.series import FloatArray
from rollout.report.svg import WIDTH

_GAP = 24
"""Width of a pause, which is not to scale."""
_MOST_GAPS = 0.35
"""Largest share of the plot's width that all pauses may take."""
_TICK_SECONDS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800] + [3600 * h for h in (1, 2, 3, 6, 12, 24, 48, 168)]


class TimeAxis:
    """Maps times of a run to horizontal positions; pauses are narrow and grey.

    Args:
        spans: the times in which the run ran, in order and disjoint.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.begin = spans[0].start
        gap = min(_GAP, _MOST_GAPS * WIDTH / max(1, len(spans) - 1))
        scale = (WIDTH - gap * (len(spans) - 1)) / sum(span.seconds for span in spans)
        times, xs = [], []
        x = 0.0
        for span in spans:
            times += [span.start, span.end]
            xs += [x, x + scale * span.seconds]
            x = xs[-1] + gap
        self._times, self._xs = np.array(times), np.array(xs)
        self._scale = scale

    def x(self, times: FloatArray | float) -> FloatArray:
        """Return the positions of times, in units of the plot."""
        xs: FloatArray = np.interp(times, self._times, self._xs)
        return xs

    def pauses(self) -> Iterator[tuple[float, float, float]]:
        """Yield the left and right edge of each pause, and its seconds."""
        for i in range(1, len(self.spans)):
            yield self._xs[2 * i - 1], self._xs[2 * i], self.spans[i].start - self.spans[i - 1].end

    def ticks(self) -> Iterator[tuple[float, str, bool]]:
        """Yield round times since the start: position, label, and whether only a wide screen has room for it."""
        step = next((s for s in _TICK_SECONDS if s * self._scale >= 90), _TICK_SECONDS[-1])
        last = last_on_phone = -math.inf
        for span in self.spans:
            first, until = (math.ceil((t - self.begin) / step) for t in (span.start, span.end))
            # Bounds the loop for a run whose clock jumped by years.
            for k in range(first, min(until, first + WIDTH)):
                x, name = float(self.x(self.begin + k * step)), clock(k * step)
                if x - last < max(68, 12 * len(name)):
                    continue
                wide = x - last_on_phone < max(160, 30 * len(name))
                yield x, name, wide
                last, last_on_phone = x, last_on_phone if wide else x


def clock(seconds: float) -> str:
    """Format a duration as days, hours, minutes and seconds, e.g. ``1:05`` or ``2 days, 3:00:00``."""
    text = str(timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0") if seconds < 3600 else text
