"""Tokens that rows will hold at steps to come: mean and variance, from how long rows last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rollout.batcher.estimators.row_memory import RowMemory, Shared
from rollout.batcher.estimators.survival import Survival, bins_of
from rollout.batcher.types import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class MemoryForecaster:
    """Tokens held at each step of a grid: [grid], or [rows, grid]."""

    mean: FloatArray
    variance: FloatArray
    most: FloatArray
    """If no row ended; what it is above the mean, rows are expected to give back."""

    def __add__(self, other: MemoryForecaster) -> MemoryForecaster:
        return MemoryForecaster(self.mean + other.mean, self.variance + other.variance, self.most + other.most)

    def less(self, tokens: float) -> MemoryForecaster:
        """With so many tokens less at all times."""
        return MemoryForecaster(self.mean - tokens, self.variance, self.most - tokens)

    def up_to_each(self) -> MemoryForecaster:
        """[rows, grid] of each row and those before it."""
        return MemoryForecaster(self.mean.cumsum(0), self.variance.cumsum(0), self.most.cumsum(0))

    def last(self) -> MemoryForecaster:
        """[grid] of the last row of [rows, grid]."""
        return MemoryForecaster(self.mean[-1], self.variance[-1], self.most[-1])

    def times(self, numbers: IntArray) -> MemoryForecaster:
        """[numbers, grid] of so many rows of the average kind."""
        many = numbers[:, None]
        return MemoryForecaster(many * self.mean.mean(0), many * self.variance.mean(0), many * self.most.mean(0))


class Forecast:
    """Survival of rows over a grid of future steps.

    Args:
        hazard: what is known of lengths, as of now.
        steps: [grid] steps from now, increasing.
    """

    def __init__(self, hazard: Survival, steps: FloatArray) -> None:
        self.steps = steps
        self._table = hazard.survival(steps)
        # One product gives mean and variance: survival s, and s * (1 - s).
        self._both = np.concatenate((self._table, self._table * (1 - self._table)), axis=1)

    def survival(self, rows: RowMemory) -> FloatArray:
        """[rows, grid] the probability that each still lives."""
        survival = self._table[bins_of(rows.ages)]
        survival[rows.ends_at_limit] = 1.0
        survival *= self.steps < rows.remaining[:, None]
        return survival

    def one_by_one(self, rows: RowMemory) -> MemoryForecaster:
        """[rows, grid] of each row."""
        survival = self.survival(rows)
        tokens = rows.own_tokens[:, None] + self.steps
        mean = survival * tokens
        return MemoryForecaster(mean, mean * (tokens - mean), tokens)

    def together(self, rows: RowMemory) -> MemoryForecaster:
        """[grid] of all rows together.

        Rows of an age are alike but for what they hold, so they are summed up by age before anything is computed, and
        those that reach their limit within the grid by age and by the part of the grid that they may live to see.
        """
        apart = rows.ends_at_limit | (rows.remaining <= self.steps[-1])
        bins = bins_of(rows.ages)
        top = int(bins.max(initial=-1)) + 1
        counted = (~apart).astype(np.float64)
        held = rows.own_tokens * counted
        sums = np.stack([np.bincount(bins, weights, top) for weights in (counted, held, held * rows.own_tokens)])
        grid, steps = len(self.steps), self.steps
        rows_, tokens, squares = sums @ self._both[:top]
        mean = tokens[:grid] + steps * rows_[:grid]
        variance = squares[grid:] + 2 * steps * tokens[grid:] + steps**2 * rows_[grid:]
        if apart.any():
            limited = self._limited(rows.taken(apart))
            mean += limited.mean
            variance += limited.variance
        return MemoryForecaster(mean, variance, rows.own_tokens.sum() + len(rows) * steps)

    def _limited(self, rows: RowMemory) -> MemoryForecaster:
        """The same of rows whose limits are within the grid, or alone end them."""
        # The first bin is of those that nothing else ends.
        bins = np.where(rows.ends_at_limit, 0, 1 + bins_of(rows.ages))
        top, grid, steps = int(bins.max()) + 1, len(self.steps), self.steps
        cells = bins * (grid + 1) + np.searchsorted(steps, rows.remaining)

        def living(weights: FloatArray | None) -> FloatArray:
            """[top, grid] of the rows of a bin that may live then."""
            counts = np.bincount(cells, weights, top * (grid + 1)).reshape(top, grid + 1)
            return counts[:, :0:-1].cumsum(1)[:, ::-1]

        count, held, squares = living(None), living(rows.own_tokens), living(rows.own_tokens**2)
        both = self._both[: top - 1]
        mean, variance = held + steps * count, squares[1:] + 2 * steps * held[1:] + steps**2 * count[1:]
        return MemoryForecaster(
            mean[0] + (both[:, :grid] * mean[1:]).sum(0),
            (both[:, grid:] * variance).sum(0),
            rows.own_tokens.sum() + len(rows) * steps,
        )

    def of_prompts(self, shared: Shared, rows: RowMemory) -> MemoryForecaster:
        """[grid] of what the live rows share; the rows of a prompt are taken to be as old as the youngest of them."""
        survival = self.survival(rows.taken(shared.lasts))
        tokens = shared.tokens[:, None]
        mean = (1 - (1 - survival) ** shared.sizes[:, None]) * tokens
        most = np.full(len(self.steps), shared.tokens.sum())
        return MemoryForecaster(mean.sum(0), (mean * (tokens - mean)).sum(0), most)
