"""Charts over time as inline SVG. All text from outside is escaped; colours are CSS classes of the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Literal

import numpy as np

from rollout.report.series import FloatArray
from rollout.report.time_axis import LEFT, RIGHT, WIDTH, TimeAxis, clock

_TOP, _BOTTOM = 16, 20
_LANE = 18
_LEAST_LANE = 4
_MOST_LANES = 240
"""Most height in pixels of all lanes of a strip."""
_LEAST_TOP = 1e-9


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
    top = _top(series)
    step, top = _steps(top)
    foot = _TOP + height
    parts = []
    for value in np.arange(0, top + step / 2, step):
        y = foot - height * value / top
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{rounded(value)}</text>')
    parts.append(_frame(axis, _TOP, foot, starts))
    left, right = axis.x(bins[0]), axis.x(bins[1])
    for one in series:
        ys = foot - height * np.minimum(one.values, top) / top
        runs = list(_runs(left, right, ys))
        if one.shape == "level":
            path = "".join(f"M{x0:.1f} {y:g}H{x1:.1f}" for run in runs for x0, x1, y in run)
        else:
            path = "".join(_stairs(run) for run in runs)
        if one.shape == "area":
            below = "".join(f"{_stairs(run)}V{foot}H{run[0][0]:.1f}z" for run in runs)
            parts.append(f'<path class="area {one.colour}" d="{below}"/>')
        parts.append(f'<path class="{"line" if one.shape == "area" else one.shape} {one.colour}" d="{path}"/>')
    for x in [] if marks is None else axis.x(marks).tolist():
        parts.append(f'<line class="mark red" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{foot}"/>')
    legend = [
        (one.colour, one.shape, one.name + (f" (cut off; up to {rounded(peak)})" if peak > top else ""))
        for one in series
        if (peak := float(np.nanmax(one.values, initial=-math.inf))) > -math.inf
    ]
    return _figure(title, unit, legend, "".join(parts), foot + _BOTTOM)


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
    parts, y = [], 2.0
    for i, lane in enumerate(lanes):
        if lane_height >= 10 or i % math.ceil(10 / lane_height) == 0:
            parts.append(_label(lane.name, y + min(lane_height, 10)))
        total = np.sum(list(lane.shares.values()), axis=0)
        base = np.zeros(len(left))
        for kind, colour in colours.items():
            if kind in lane.shares:
                share = np.divide(lane.shares[kind], total, out=np.zeros(len(left)), where=total > 0)
                path = _bars(left, right, y + lane_height * base, lane_height * share)
                parts.append(f'<path class="fill {colour}" d="{path}"/>')
                base += share
        y += lane_height + (2 if lane_height > 6 else 1)
    legend = [(colour, "fill", kind) for kind, colour in colours.items() if any(kind in lane.shares for lane in lanes)]
    if counts is not None:
        most = float(counts.values.max())
        heights = 18 * counts.values / max(most, 1)
        parts.append(_label(counts.name, y + 14))
        # At least two pixels wide, so that short bins are visible.
        bars = _bars(left, np.maximum(right, left + 2), y + 20 - heights, heights)
        parts.append(f'<path class="fill {counts.colour}" d="{bars}"/>')
        legend.append((counts.colour, "fill", f"{counts.name} (at most {rounded(most)} in a bin)"))
        if marks is not None and len(marks):
            diamonds = "".join(f"M{x:.1f} {y + 2:.1f}l5 7l-5 7l-5-7z" for x in axis.x(marks).tolist())
            parts.append(f'<path class="diamond red" d="{diamonds}"/>')
            legend.append(("red", "diamond", "out of memory"))
        y += 22
    return _figure(title, "", legend, _frame(axis, 0, y, None) + "".join(parts), y + _BOTTOM)


# -- the parts of a figure -------------------------------------------------------------------------------


def _figure(title: str, unit: str, legend: Sequence[tuple[str, str, str]], content: str, height: float) -> str:
    keys = "".join(
        f'<li><i class="key {shape} {colour}"></i>{escape(name)}</li>' for colour, shape, name in legend if name
    )
    unit = f" <small>{escape(unit)}</small>" if unit else ""
    return (
        f'<figure><figcaption><b>{escape(title)}</b>{unit}<ul>{keys}</ul></figcaption><svg viewBox="0 0 {WIDTH} '
        f'{height:.0f}" role="img" aria-label="{escape(title)}">{content}<line class="cross" y1="0" '
        f'y2="{height - _BOTTOM:.0f}"/></svg></figure>\n'
    )


def _frame(axis: TimeAxis, top: float, foot: float, starts: Mapping[int, float] | None) -> str:
    """Draw pauses, the time axis, and the starts of attempts, with labels where there is room."""
    parts = []
    for left, right, seconds in axis.pauses():
        parts.append(
            f'<rect class="pause" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{foot - top:.1f}"/>'
        )
        if starts is not None and right - left >= 12:
            x, y = (left + right) / 2 + 3.5, (top + foot) / 2
            turn = f'transform="rotate(-90 {x:.1f} {y:.1f})"'
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="middle" {turn}>'
                f"pause {escape(clock(seconds))}</text>"
            )
    for x, name in axis.ticks():
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{foot + 3:.1f}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{foot + 15:.1f}" text-anchor="middle">{escape(name)}</text>')
    named = [(number, float(axis.x(time))) for number, time in (starts or {}).items()]
    last = -math.inf
    for i, (number, x) in enumerate(named):
        parts.append(f'<line class="start" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{foot:.1f}"/>')
        if x - last < 16:
            continue
        name = f"attempt {number}" if i + 1 == len(named) or named[i + 1][1] - x >= 64 else f"{number}"
        end = ' text-anchor="end"' if x + 64 > RIGHT else ""
        parts.append(f'<text class="tick" x="{x:.1f}" y="{top - 4:.1f}"{end}>{name}</text>')
        last = x
    return "".join(parts)


def _label(text: str, y: float) -> str:
    return f'<text class="tick" x="{LEFT - 6}" y="{y:.1f}" text-anchor="end">{escape(text)}</text>'


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


def _top(series: Sequence[Series]) -> float:
    """Return the highest value to show.

    A few outliers, such as a first step that compiles, or a series that does not lead must not flatten the rest.
    """
    finite = [(one.leading, one.values[np.isfinite(one.values)]) for one in series]
    leading = [values for leads, values in finite if leads and len(values)]
    if not leading:
        return 1.0
    highest = max(float(values.max()) for values in leading)
    usual = max(float(np.quantile(values, 0.95)) for values in leading)
    top = highest if highest <= 4 * usual else 1.6 * usual
    others = [float(values.max()) for leads, values in finite if not leads and len(values)]
    return max([top, *(min(other, 1.5 * top) for other in others)])


def _steps(top: float) -> tuple[float, float]:
    """Return a round spacing of three to six grid lines that reach ``top``, and the value of the last line."""
    top = top if top > _LEAST_TOP else 1.0
    unit = 10.0 ** math.floor(math.log10(top / 3))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10, 20) if unit * m * 6 >= top * 1.04)
    return step, step * math.ceil(top * 1.04 / step - 1e-9)


def rounded(value: float) -> str:
    """Format a number with four significant digits, or as a whole number from 1000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
