"""Figures that tests of the benchmarks share."""

from __future__ import annotations

PROMPTS = [[1, 2, 3 + i] for i in range(128)]
GIB = 2**30
