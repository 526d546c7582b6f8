"""Histograms: bars, labels and totals."""

from __future__ import annotations

import random
import re

import pytest

from rollout.report.histogram import Stack, histogram


def titles(text: str) -> dict[str, int]:
    """Return the count of each bar by its name."""
    found = re.findall(r"<title>(.*?): samples ([\d,]+)\n", text)
    return {name: int(count.replace(",", "")) for name, count in found}


def test_few_values_have_a_bar_each() -> None:
    text = histogram("Reward", "", [Stack("a", "blue", {0.0: 5, 1.0: 2}), Stack("b", "red", {1.0: 1})], "samples")
    assert titles(text) == {"0": 5, "1": 3}
    assert "a 2, b 1" in text


@pytest.mark.parametrize(
    "values",
    [
        random.Random(0).choices(range(1, 2000), k=5000),
        [random.Random(i).gauss(-3, 0.01) for i in range(3000)],
        [*range(1, 300), *[100_000] * 3],
        [1e-12 * i for i in range(99)],
        [1e12 + i for i in range(50)],
    ],
)
def test_bars_preserve_totals_and_are_few(values: list[float]) -> None:
    counts = {value: values.count(value) for value in set(values)}
    text = histogram("Length", "", [Stack("a", "blue", counts)], "samples")
    bars = re.findall(r"<title>.*: samples ([\d,]+)\n", text)
    assert sum(int(count.replace(",", "")) for count in bars) == len(values)
    assert 5 <= len(bars) <= 42
    labels = re.findall(r'class="tick" x="([\d.]+)%" y="133', text)
    assert 2 <= len(labels) <= 8
    assert all(0 <= float(x) <= 100 for x in labels)
    heights = [float(height) for height in re.findall(r'<rect.*? height="([\d.]+)"', text)]
    assert all(1 <= height <= 110 for height in heights)


def test_long_tail_becomes_one_bar() -> None:
    counts = {float(value): 10 for value in range(300)} | {90_000.0: 1}
    text = histogram("Length", "tokens", [Stack("", "blue", counts)], "samples")
    *usual, last = titles(text).items()
    assert len(usual) >= 30
    assert last[0].endswith("to 90,000")
    assert last[1] <= 11


def test_no_values_draw_nothing() -> None:
    assert histogram("Length", "", [Stack("a", "blue", {})], "samples") == ""
