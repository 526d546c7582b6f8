"""Parts that charts over time and histograms share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH = 1000
"""Width of a plot in units; a unit is about 0.9 pixels on a desktop and 0.3 on a phone."""
FOOT = 20
"""Height in pixels of the labels below a plot."""
_LEAST_RANGE = 1e-9


def figure(title: str, unit: str, legend: Sequence[tuple[str, str, str]], content: str, height: float) -> str:
    """Draw a figure.

    Args:
        legend: colour, shape and name of each key.
        content: the parts of an SVG whose horizontal positions are percentages.
        height: of the plot and its labels, in pixels.
    """
    keys = "".join(
        f'<li><i class="key {shape} {colour}"></i>{escape(name)}</li>' for colour, shape, name in legend if name
    )
    unit = f" <small>{escape(unit)}</small>" if unit else ""
    return (
        f'<figure><figcaption><b>{escape(title)}</b>{unit}<ul>{keys}</ul></figcaption><svg class="plot" '
        f'height="{height:.0f}" role="img" aria-label="{escape(title)}">{content}<line class="cross" y1="0" '
        f'y2="{height - FOOT:.0f}"/></svg></figure>\n'
    )


def label(text: str, y: float) -> str:
    """Write text to the left of the plot."""
    return f'<text class="tick" x="-6" y="{y:.1f}" text-anchor="end">{escape(text)}</text>'


def percent(x: float) -> str:
    """Return a horizontal position or length as a share of the plot's width."""
    return f"{100 * x / WIDTH:.2f}%"


def round_steps(low: float, top: float) -> tuple[float, float, float]:
    """Return a round spacing of three to seven grid lines from ``low`` to ``top``, and the first and last of them."""
    size = top - low if top - low > _LEAST_RANGE else 1.0
    unit = 10.0 ** math.floor(math.log10(size / 3))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10, 20) if unit * m * 6 >= size * 1.04)
    first, last = math.floor(low / step), math.ceil((low + size + 0.04 * size) / step - 1e-9)
    return step, step * first, step * last


def rounded(value: float) -> str:
    """Format a number with four significant digits, or as a whole number from 1000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
