"""Forecast of the tokens that rows will hold at future steps: mean and variance, from survival estimates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rollout.batcher.estimators.row_memory import RowMemory
from rollout.batcher.estimators.survival import Survival, bins_of
from rollout.batcher.types import FloatArray, IntArray, SharedPages


@dataclass(frozen=True, slots=True)
class MemoryForecast:
    """Tokens held at each step of a grid; arrays of shape [grid] or [rows, grid]."""

    mean: FloatArray
    variance: FloatArray
    without_exits: FloatArray
    """Tokens held if no row finished; the excess over ``mean`` is what rows are expected to free."""

    def __add__(self, other: MemoryForecast) -> MemoryForecast:
        return MemoryForecast(
            mean=self.mean + other.mean,
            variance=self.variance + other.variance,
            without_exits=self.without_exits + other.without_exits,
        )

    def minus(self, tokens: float) -> MemoryForecast:
        """Subtract a known number of tokens at every step."""
        return MemoryForecast(
            mean=self.mean - tokens, variance=self.variance, without_exits=self.without_exits - tokens
        )

    def cumulative(self) -> MemoryForecast:
        """[rows, grid] Sum each row with the rows before it."""
        return MemoryForecast(
            mean=self.mean.cumsum(0), variance=self.variance.cumsum(0), without_exits=self.without_exits.cumsum(0)
        )

    def last_row(self) -> MemoryForecast:
        """[grid] Return the last row of a [rows, grid] forecast."""
        return MemoryForecast(mean=self.mean[-1], variance=self.variance[-1], without_exits=self.without_exits[-1])

    def average_rows(self, counts: IntArray) -> MemoryForecast:
        """[counts, grid] Forecast each number of rows that are like the average row."""
        column = counts[:, None]
        return MemoryForecast(
            mean=column * self.mean.mean(0),
            variance=column * self.variance.mean(0),
            without_exits=column * self.without_exits.mean(0),
        )


class MemoryForecaster:
    """Forecast the memory of rows over a grid of future steps.

    Args:
        survival: the current estimate of how long rows live.
        steps: [grid] increasing numbers of steps from now.
    """

    def __init__(self, survival: Survival, steps: FloatArray) -> None:
        self.steps = steps
        self._table = survival.survival(steps)
        """[bins, grid] survival probability s of rows in an age bin."""
        # [bins, 2 * grid] s and s * (1 - s), so that a single matrix product yields mean and variance.
        self._moments = np.concatenate((self._table, self._table * (1 - self._table)), axis=1)

    def survival(self, rows: RowMemory) -> FloatArray:
        """[rows, grid] Return the probability that each row is still alive."""
        survival = self._table[bins_of(rows.ages)]
        survival[rows.ends_at_limit] = 1.0
        survival *= self.steps < rows.remaining[:, None]
        return survival

    def per_row(self, rows: RowMemory) -> MemoryForecast:
        """[rows, grid] Forecast each row."""
        tokens = rows.own_tokens[:, None] + self.steps
        mean = self.survival(rows) * tokens
        return MemoryForecast(mean=mean, variance=mean * (tokens - mean), without_exits=tokens)

    def total(self, rows: RowMemory) -> MemoryForecast:
        """[grid] Forecast the sum over rows.

        Rows of the same age bin have the same survival, so they are summed per bin first. Rows that reach their
        limit within the grid are summed per bin and per grid step of their limit.
        """
        reach_limit = rows.ends_at_limit | (rows.remaining <= self.steps[-1])
        bins = bins_of(rows.ages)
        bin_count = int(bins.max(initial=-1)) + 1
        counted = (~reach_limit).astype(np.float64)
        held = rows.own_tokens * counted
        # [3, bins] rows, their tokens, and the squares of their tokens.
        sums = np.stack([np.bincount(bins, weights, bin_count) for weights in (counted, held, held * rows.own_tokens)])
        grid, steps = len(self.steps), self.steps
        count, tokens, squares = sums @ self._moments[:bin_count]
        mean = tokens[:grid] + steps * count[:grid]
        variance = squares[grid:] + 2 * steps * tokens[grid:] + steps**2 * count[grid:]
        if reach_limit.any():
            limited = self._total_with_limits(rows.select(reach_limit))
            mean += limited.mean
            variance += limited.variance
        return MemoryForecast(mean=mean, variance=variance, without_exits=rows.own_tokens.sum() + len(rows) * steps)

    def _total_with_limits(self, rows: RowMemory) -> MemoryForecast:
        """[grid] Forecast the sum over rows that reach their limit within the grid or end only there."""
        # Bin 0 is for rows that end only at their limit; age bins follow.
        bins = np.where(rows.ends_at_limit, 0, 1 + bins_of(rows.ages))
        bin_count, grid, steps = int(bins.max()) + 1, len(self.steps), self.steps
        cells = bins * (grid + 1) + np.searchsorted(steps, rows.remaining)

        def below_limit(weights: FloatArray | None) -> FloatArray:
            """[bins, grid] Sum the weights of rows that have not reached their limit at each step."""
            counts = np.bincount(cells, weights, bin_count * (grid + 1)).reshape(bin_count, grid + 1)
            return counts[:, :0:-1].cumsum(1)[:, ::-1]

        count = below_limit(None)
        held = below_limit(rows.own_tokens)
        squares = below_limit(rows.own_tokens**2)
        moments = self._moments[: bin_count - 1]
        mean = held + steps * count
        variance = squares[1:] + 2 * steps * held[1:] + steps**2 * count[1:]
        return MemoryForecast(
            mean=mean[0] + (moments[:, :grid] * mean[1:]).sum(0),
            variance=(moments[:, grid:] * variance).sum(0),
            without_exits=rows.own_tokens.sum() + len(rows) * steps,
        )

    def shared_pages(self, shared: SharedPages, rows: RowMemory) -> MemoryForecast:
        """[grid] Forecast pages that several rows hold until the last of them ends.

        All holders of a piece count as old as the youngest of them.
        """
        survival = self.survival(rows.select(shared.youngest))
        tokens = shared.tokens.astype(np.float64)[:, None]
        mean = (1 - (1 - survival) ** shared.holders[:, None]) * tokens
        return MemoryForecast(
            mean=mean.sum(0),
            variance=(mean * (tokens - mean)).sum(0),
            without_exits=np.full(len(self.steps), tokens.sum()),
        )
