"""Charts: scales, lines and the axis of time."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from rollout.report.charts import Series
from rollout.report.metric_lines import Span
from rollout.report.svg import WIDTH
from rollout.report.time_axis import TimeAxis, clock
from rollout.run_dir.paths import RunPaths
from tests.support.report import figure, history_of


def test_outliers_and_series_that_do_not_lead_are_cut_off(paths: RunPaths) -> None:
    history = history_of(paths)
    steady, spike = np.full(100, 10.0), np.full(100, 10.0)
    spike[0] = 5000
    assert "(cut off; up to 5,000)" in figure(history, Series("a", spike, "blue"))
    assert "cut off" not in figure(history, Series("a", np.linspace(0, 5000, 100), "blue"))
    both = figure(history, Series("a", steady, "blue"), Series("b", 100 * steady, "red", leading=False))
    assert '<li><i class="key line blue"></i>a</li>' in both
    assert "b (cut off; up to 1,000)" in both
    near = figure(history, Series("a", steady, "blue"), Series("b", 1.4 * steady, "red", leading=False))
    assert "cut off" not in near


@pytest.mark.parametrize("top", [0.0, 5e-324, 0.013, 1.0, 3.0, 7.0, 39.0, 41.0, 99.0, 100.0, 12345.0, 1e15])
def test_scale_has_few_round_steps_and_covers_all_values(paths: RunPaths, top: float) -> None:
    text = figure(history_of(paths), Series("a", np.full(100, top), "blue", "area"))
    labels = [float(label.replace(",", "")) for label in re.findall(r'text-anchor="end">([^<]*)</text>', text)]
    assert 3 <= len(labels) <= 7
    assert labels[0] == 0
    assert labels[-1] >= top
    assert "cut off" not in text
    assert len(set(np.diff(labels).round(12))) == 1
    heights = [float(y) for y in re.findall(r"[MV]\S* ?(-?[\d.]+)", text)]
    assert all(0 <= y <= 170 for y in heights)


def test_limit_above_the_scale_is_named_but_not_drawn(paths: RunPaths) -> None:
    limit = Series("limit", np.repeat([20.0, 1000.0], 50), "red", "dashed", leading=False)
    text = figure(history_of(paths), Series("held", np.full(100, 14.0), "blue", "area"), limit)
    (path,) = re.findall(r'class="dashed red" d="([^"]*)"', text)
    assert path.count("H") == 1
    assert path.endswith("H500.0")
    assert "limit (cut off; up to 1,000)" in text


def test_lines_are_broken_at_unknown_values(paths: RunPaths) -> None:
    history = history_of(paths)
    values = np.full(100, 10.0)
    values[40:60] = math.nan
    path = re.findall(r'class="line blue" d="([^"]*)"', figure(history, Series("a", values, "blue")))[0]
    assert path.count("M") == 2


def test_pauses_are_narrow_and_ticks_readable() -> None:
    spans = [Span(0, 100), Span(10_000, 10_300), Span(10_310, 10_311)]
    axis = TimeAxis(spans)
    xs = axis.x(np.array([0, 100, 10_000, 10_300, 10_310, 10_311]))
    assert (xs[0], xs[-1]) == (0, pytest.approx(WIDTH))
    assert (np.diff(xs) > 0).all()
    assert xs[3] - xs[2] == pytest.approx(3 * (xs[1] - xs[0]))
    assert [(round(right - left), seconds) for left, right, seconds in axis.pauses()] == [(24, 9900), (24, 10)]
    ticks = list(axis.ticks())
    assert 5 <= len(ticks) <= 15
    assert min(np.diff([x for x, _, _ in ticks])) >= 60
    assert 2 <= len(on_phone := [x for x, _, wide in ticks if not wide]) <= 5
    assert min(np.diff(on_phone)) >= 160
    assert [name for _, name, _ in ticks[:4]] == ["0:00", "1:00", "2:47:00", "2:48:00"]


def test_many_pauses_take_a_limited_share() -> None:
    axis = TimeAxis([Span(100.0 * i, 100.0 * i + 10) for i in range(500)])
    widths = [right - left for left, right, _ in axis.pauses()]
    assert sum(widths) == pytest.approx(0.35 * WIDTH)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (9.6, "0:10"), (65, "1:05"), (3599, "59:59"), (3600, "1:00:00"), (180_000, "2 days, 2:00:00")],
)
def test_clock_formats_durations(seconds: float, text: str) -> None:
    assert clock(seconds) == text
