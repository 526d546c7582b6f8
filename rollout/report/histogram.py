"""Histograms as inline SVG, with one bar per value where there are few values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

from rollout.report.series import FloatArray
from rollout.report.svg import FOOT, WIDTH, figure, label, percent, round_steps, rounded

_TOP = 8
_HEIGHT = 110
_FEW_VALUES = 12
"""Most values with a bar each."""
_MOST_BARS = 40
_WIDEST_BAR = 120
_TAIL = 0.98
"""Share of the values that bars of equal width must show; a long tail beyond them becomes one bar."""


@dataclass(frozen=True, slots=True)
class Stack:
    """One part of each bar."""

    name: str
    colour: str
    counts: Mapping[int, int] | Mapping[float, int]
    """By value."""


@dataclass(frozen=True, slots=True)
class _Bars:
    """The bars of a histogram: where each begins, and what it counts."""

    labels: list[tuple[float, str, bool]]
    """Position in bars, text, and whether only a wide screen has room for it."""
    names: list[str]
    """[bars]"""
    bar_of: Mapping[float, int]
    """The bar of each value."""


def histogram(title: str, unit: str, stacks: Sequence[Stack], total: str) -> str:
    """Draw a histogram; empty without values.

    Args:
        total: what the bars count, e.g. ``samples``.
    """
    values: dict[float, int] = {}
    for stack in stacks:
        for value, count in stack.counts.items():
            values[value] = values.get(value, 0) + count
    if not values:
        return ""
    bars = _one_bar_per_value(values) if len(values) <= _FEW_VALUES else _equal_bars(values)
    heights = np.zeros((len(stacks), len(bars.names)))
    for number, stack in enumerate(stacks):
        for value, count in stack.counts.items():
            heights[number, bars.bar_of[value]] += count
    present = [number for number in range(len(stacks)) if heights[number].any()]
    legend = [(stacks[number].colour, "fill", stacks[number].name) for number in present]
    return figure(title, unit, legend, _content(bars, heights, stacks, total), _TOP + _HEIGHT + FOOT)


def _content(bars: _Bars, heights: FloatArray, stacks: Sequence[Stack], total: str) -> str:
    most = float(heights.sum(axis=0).max())
    step = math.ceil(round_steps(0.0, most)[0])
    top = step * math.ceil(1.04 * most / step)
    foot, scale, width = _TOP + _HEIGHT, _HEIGHT / top, WIDTH / len(bars.names)
    parts = []
    for value in np.arange(0, top + step / 2, step):
        y = foot - scale * value
        parts.append(f'<line class="grid" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(label(rounded(value), y + 3.5))
    for bar, name in enumerate(bars.names):
        counts = heights[:, bar]
        if not counts.any():
            continue
        shares = [f"{stack.name} {count:,.0f}" for stack, count in zip(stacks, counts, strict=True) if count]
        parts.append(f"<g><title>{escape(f'{name}: {total} {counts.sum():,.0f}')}\n{escape(', '.join(shares))}</title>")
        y = float(foot)
        for stack, count in zip(stacks, counts.tolist(), strict=True):
            # Rare values stay visible.
            height = max(scale * count, 1.0) if count else 0.0
            y -= height
            if height:
                wide = min(0.88 * width, _WIDEST_BAR)
                place = f'x="{percent(width * (bar + 0.5) - wide / 2)}" width="{percent(wide)}"'
                parts.append(f'<rect class="fill {stack.colour}" {place} y="{y:.1f}" height="{height:.1f}"/>')
        parts.append("</g>")
    for at, text, wide in bars.labels:
        anchor = "middle" if width * at < 0.94 * WIDTH else "end"  # so that no label widens the page
        place = f'x="{percent(width * at)}" y="{foot + 15}" text-anchor="{anchor}"'
        parts.append(f'<text class="tick{" wide" if wide else ""}" {place}>{escape(text)}</text>')
    return "".join(parts)


def _one_bar_per_value(values: Mapping[float, int]) -> _Bars:
    ordered = sorted(values)
    names = [rounded(value) for value in ordered]
    # A phone has room for about 36 characters.
    stride = math.ceil(sum(len(name) + 2 for name in names) / 36)
    return _Bars(
        labels=[(bar + 0.5, name, bar % stride != 0) for bar, name in enumerate(names)],
        names=names,
        bar_of={value: bar for bar, value in enumerate(ordered)},
    )


def _equal_bars(values: Mapping[float, int]) -> _Bars:
    ordered = np.array(sorted(values))
    shares = np.cumsum([values[value] for value in ordered.tolist()]) / sum(values.values())
    low, high = float(ordered[0]), float(ordered[-1])
    usual = float(ordered[np.searchsorted(shares, _TAIL)])
    has_tail = high - low > 2 * (usual - low)
    width = _round_width(((usual if has_tail else high) - low) / _MOST_BARS, whole=bool((ordered % 1 == 0).all()))
    first = math.floor(low / width)
    count = math.floor((usual if has_tail else high) / width) - first + 1
    edges = [(first + bar) * width for bar in range(count + 1)]
    names = [f"{rounded(left)} to {rounded(right)}" for left, right in pairwise(edges)]
    if has_tail:
        names.append(f"{rounded(edges[-1])} to {rounded(high)}")
    bar_of = {value: min(math.floor(value / width) - first, len(names) - 1) for value in ordered.tolist()}
    stride = max(1, math.ceil(count / 10))
    labels = [
        (float(bar), rounded(edge), bar // stride % 2 != 0) for bar, edge in enumerate(edges) if bar % stride == 0
    ]
    if has_tail:
        labels = [one for one in labels if one[0] <= count - stride]
        labels.append((count + 0.5, f"to {rounded(high)}", False))
    return _Bars(labels=labels, names=names, bar_of=bar_of)


def _round_width(width: float, *, whole: bool) -> float:
    """Return the next larger of 1, 2, 2.5 or 5 times a power of ten; at least 1 for whole values."""
    unit = 10.0 ** math.floor(math.log10(width)) if width > 0 else 1.0
    wider = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= width)
    return max(math.ceil(wider), 1.0) if whole else wider
