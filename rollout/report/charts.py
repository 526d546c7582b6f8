"""Charts over time as inline SVG. All text from outside is escaped; colours are CSS classes of the page.

A figure holds two nested drawings. The outer one has pixels of the screen, so that text keeps its size on a phone; its
horizontal positions are percentages. The inner one holds the shapes and is stretched to the width of the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Literal

import numpy as np

from rollout.report.series import FloatArray
from rollout.report.svg import FOOT, WIDTH, figure, label, percent, round_steps, rounded
from rollout.report.time_axis import TimeAxis, clock

_TOP = 16
_LANE = 18
_LEAST_LANE = 4
_MOST_LANES = 240
"""Most height in pixels of all lanes of a strip."""
_LEAST_BAR = 3
"""Least width of a bar of counts, so that short bins are visible."""


@dataclass(frozen=True, slots=True)
class Series:
    """Values over the bins of a run."""

    name: str
    values: FloatArray
    """[bins]; NaN where unknown."""
    colour: str
    shape: Literal["line", "area", "dashed", "level"] = "line"
    """``level``: one dash per bin, for values that jump."""
    leading: bool = True
    """Whether the scale must cover it; a series that does not lead is cut off where the others would look flat."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Shares of kinds in each bin, as one lane of a strip."""

    name: str
    shares: Mapping[str, FloatArray]
    """[bins] per kind; normalised when drawn."""


def chart(
    title: str,
    unit: str,
    axis: TimeAxis,
    bins: tuple[FloatArray, FloatArray],
    series: Sequence[Series],
    *,
    height: int = 150,
    starts: Mapping[int, float] | None = None,
    marks: FloatArray | None = None,
) -> str:
    """Draw one or more series on one scale.

    Args:
        bins: starts and ends of the bins.
        starts: start times of attempts, by number.
        marks: times of allocation failures.
    """
    low, top = _range(series)
    step, low, top = round_steps(low, top)
    foot = _TOP + height
    parts = []
    for value in np.arange(low, top + step / 2, step):
        y = foot - height * (value - low) / (top - low)
        parts.append(f'<line class="grid" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(label(rounded(value), y + 3.5))
    parts.append(_frame(axis, _TOP, foot, starts))
    shapes = []
    left, right = axis.x(bins[0]), axis.x(bins[1])
    for one in series:
        # A limit above the scale is not drawn: a line at the top would be read as its value.
        shown = one.values if one.shape != "dashed" else np.where(one.values <= top, one.values, np.nan)
        ys = foot - height * (np.minimum(shown, top) - low) / (top - low)
        runs = list(_runs(left, right, ys))
        if one.shape == "level":
            path = "".join(f"M{x0:.1f} {y:g}H{x1:.1f}" for run in runs for x0, x1, y in run)
        else:
            path = "".join(_stairs(run) for run in runs)
        if one.shape == "area":
            below = "".join(f"{_stairs(run)}V{foot}H{run[0][0]:.1f}z" for run in runs)
            shapes.append(f'<path class="area {one.colour}" d="{below}"/>')
        shapes.append(f'<path class="{"line" if one.shape == "area" else one.shape} {one.colour}" d="{path}"/>')
    parts.append(_stretched(shapes, foot))
    for x in [] if marks is None else axis.x(marks).tolist():
        parts.append(f'<line class="mark red" x1="{percent(x)}" x2="{percent(x)}" y1="{_TOP}" y2="{foot}"/>')
    legend = [
        (one.colour, one.shape, one.name + (f" (cut off; up to {rounded(peak)})" if peak > top else ""))
        for one in series
        if (peak := float(np.nanmax(one.values, initial=-math.inf))) > -math.inf
    ]
    return figure(title, unit, legend, "".join(parts), foot + FOOT)


def strip(
    title: str,
    axis: TimeAxis,
    bins: tuple[FloatArray, FloatArray],
    lanes: Sequence[Lane],
    colours: Mapping[str, str],
    *,
    counts: Series | None = None,
    marks: FloatArray | None = None,
) -> str:
    """Draw lanes in which each bin shows the shares of its kinds.

    Args:
        colours: by kind, in the order of the legend.
        counts: bars below the lanes.
        marks: times of allocation failures, marked among the bars.
    """
    lane_height = max(_LEAST_LANE, min(_LANE, _MOST_LANES // len(lanes)))
    left, right = axis.x(bins[0]), axis.x(bins[1])
    parts: list[str] = []
    shapes: list[str] = []
    y = 2.0
    for i, lane in enumerate(lanes):
        if lane_height >= 10 or i % math.ceil(10 / lane_height) == 0:
            parts.append(label(lane.name, y + min(lane_height, 10)))
        total = np.sum(list(lane.shares.values()), axis=0)
        base = np.zeros(len(left))
        for kind, colour in colours.items():
            if kind in lane.shares:
                share = np.divide(lane.shares[kind], total, out=np.zeros(len(left)), where=total > 0)
                path = _bars(left, right, y + lane_height * base, lane_height * share)
                shapes.append(f'<path class="fill {colour}" d="{path}"/>')
                base += share
        y += lane_height + (2 if lane_height > 6 else 1)
    legend = [(colour, "fill", kind) for kind, colour in colours.items() if any(kind in lane.shares for lane in lanes)]
    if counts is not None:
        most = float(counts.values.max())
        heights = 18 * counts.values / max(most, 1)
        parts.append(label(counts.name, y + 14))
        bars = _bars(left, np.maximum(right, left + _LEAST_BAR), y + 20 - heights, heights)
        shapes.append(f'<path class="fill {counts.colour}" d="{bars}"/>')
        legend.append((counts.colour, "fill", f"{counts.name} (at most {most:,.0f} in a bin)"))
        if marks is not None and len(marks):
            dots = (
                f'<circle class="dot red" cx="{percent(x)}" cy="{y + 10:.1f}" r="4"/>' for x in axis.x(marks).tolist()
            )
            parts.extend(dots)
            legend.append(("red", "dot", "out of memory"))
        y += 22
    content = _frame(axis, 0, y, None) + _stretched(shapes, y) + "".join(parts)
    return figure(title, "", legend, content, y + FOOT)


# -- the parts of a figure -------------------------------------------------------------------------------


def _stretched(shapes: Sequence[str], foot: float) -> str:
    """Draw shapes, whose horizontal positions are those of the time axis, over the whole width."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {foot:.1f}" width="100%" height="{foot:.1f}" preserveAspectRatio="none">'
        f"{''.join(shapes)}</svg>"
    )


def _frame(axis: TimeAxis, top: float, foot: float, starts: Mapping[int, float] | None) -> str:
    """Draw pauses, the time axis, and the starts of attempts, with labels where there is room."""
    parts = []
    for left, right, seconds in axis.pauses():
        parts.append(
            f'<rect class="pause" x="{percent(left)}" y="{top:.1f}" width="{percent(right - left)}" '
            f'height="{foot - top:.1f}"/>'
        )
        if starts is not None and right - left >= 14:
            place = f'x="{percent((left + right) / 2)}" y="{(top + foot) / 2:.1f}"'
            parts.append(f'<text class="tick upright wide" {place}>pause {escape(clock(seconds))}</text>')
    for x, name, wide in axis.ticks():
        kind = "wide" if wide else ""
        parts.append(
            f'<line class="grid {kind}" x1="{percent(x)}" x2="{percent(x)}" y1="{top:.1f}" y2="{foot + 3:.1f}"/>'
        )
        anchor = "middle" if x < 0.94 * WIDTH else "end"  # so that no label widens the page
        place = f'x="{percent(x)}" y="{foot + 15:.1f}" text-anchor="{anchor}"'
        parts.append(f'<text class="tick {kind}" {place}>{escape(name)}</text>')
    named = [(number, float(axis.x(time))) for number, time in (starts or {}).items()]
    last = -math.inf
    for i, (number, x) in enumerate(named):
        parts.append(f'<line class="start" x1="{percent(x)}" x2="{percent(x)}" y1="{top:.1f}" y2="{foot:.1f}"/>')
        if x - last < 18:
            continue
        name = f"attempt {number}" if i + 1 == len(named) or named[i + 1][1] - x >= 73 else f"{number}"
        kind = "wide" if x - last < 200 else ""
        end = ' text-anchor="end"' if x > 0.8 * WIDTH else ""
        parts.append(f'<text class="tick {kind}" x="{percent(x)}" y="{top - 4:.1f}"{end}>{name}</text>')
        last = x
    return "".join(parts)


Point = tuple[float, float, float]
"""Left, right and height."""


def _runs(left: FloatArray, right: FloatArray, ys: FloatArray) -> Iterator[list[Point]]:
    """Yield runs of neighbouring bins with values; bins of equal height are merged."""
    run: list[Point] = []
    for x0, x1, y in zip(left.tolist(), right.tolist(), np.round(ys, 1).tolist(), strict=True):
        if run and (math.isnan(y) or x0 > run[-1][1] + 0.01):
            yield run
            run = []
        if math.isnan(y):
            continue
        if run and run[-1][2] == y:
            run[-1] = (run[-1][0], x1, y)
        else:
            run.append((x0, x1, y))
    if run:
        yield run


def _stairs(run: Sequence[Point]) -> str:
    """Return a path along the tops of the bins."""
    x0, x1, y = run[0]
    return f"M{x0:.1f} {y:g}H{x1:.1f}" + "".join(f"V{y:g}H{x1:.1f}" for _, x1, y in run[1:])


def _bars(left: FloatArray, right: FloatArray, tops: FloatArray, heights: FloatArray) -> str:
    """Return a path of rectangles; equal neighbours are merged."""
    bars = zip(*(np.round(a, 1).tolist() for a in (tops, heights, left, right)), strict=True)
    path = []
    for (top, height), same in groupby((bar for bar in bars if bar[1] > 0), key=lambda bar: bar[:2]):
        start = end = None
        for _, _, x0, x1 in same:
            if end is not None and x0 > end:
                path.append(f"M{start:g} {top:g}H{end:g}v{height:g}H{start:g}z")
                start = None
            start, end = x0 if start is None else start, x1
        path.append(f"M{start:g} {top:g}H{end:g}v{height:g}H{start:g}z")
    return "".join(path)


# -- scales ----------------------------------------------------------------------------------------------


def _range(series: Sequence[Series]) -> tuple[float, float]:
    """Return the lowest and highest value to show; the lowest is at most 0.

    A few outliers, such as a first step that compiles, or a series that does not lead must not flatten the rest.
    """
    finite = [(one.leading, one.values[np.isfinite(one.values)]) for one in series]
    leading = [values for leads, values in finite if leads and len(values)]
    if not leading:
        return 0.0, 1.0
    low = min(0.0, *(float(values.min()) for values in leading))
    highest = max(float(values.max()) for values in leading)
    usual = max(float(np.quantile(values, 0.95)) for values in leading)
    top = highest if highest <= 4 * usual else 1.6 * usual
    others = [float(values.max()) for leads, values in finite if not leads and len(values)]
    return low, max([top, 0.0, *(min(other, 1.5 * top) for other in others)])
