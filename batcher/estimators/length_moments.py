"""Mean and variance of prompt and output lengths, learned while rows run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rollout.batcher.types import FinishedRow, IntArray, Observation


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of the lengths of one row, in tokens and tokens squared."""

    prompt_mean: float
    prompt_variance: float
    output_mean: float
    output_variance: float

    @property
    def mean(self) -> float:
        """Mean of prompt plus output: mu in equation 12."""
        return self.prompt_mean + self.output_mean

    @property
    def sd(self) -> float:
        """Standard deviation of prompt plus output, taken as independent: sigma in equation 12."""
        return math.sqrt(self.prompt_variance + self.output_variance)


class LengthMoments:
    """Moments of row lengths over the rows that finished last and the rows that live now.

    The mean of finished outputs alone is too small while a job is young, because short rows finish first.
    Live rows are therefore counted as right-censored lengths, by the Kaplan-Meier estimator (in Efron's
    form: the probability left after the last finished length is shared by the live rows older than it).
    What such a row still has to go is the prior: uniform up to its own ``max_new_tokens``. With nothing
    finished, new rows thus stand for half of ``max_new_tokens``, and the prior fades as rows finish.

    Prompts are known in full, so theirs are plain moments. Waiting prompts are left out: observations count
    a prompt that several rows share once, which would make rows look shorter than they will be.

    Args:
        length_window: finished rows to remember; older ones are forgotten, so that the estimate follows a drift.

    Raises:
        ValueError: ``length_window`` is less than 1.
    """

    def __init__(self, length_window: int = 1024) -> None:
        if length_window < 1:
            raise ValueError(f"length_window must be at least 1, not {length_window}.")
        self._prompts: IntArray = np.zeros(length_window, dtype=np.int64)
        self._outputs: IntArray = np.zeros(length_window, dtype=np.int64)
        self._seen = 0

    def update(self, finished: Iterable[FinishedRow]) -> None:
        """Learn the lengths of rows that ended."""
        for row in finished:
            slot = self._seen % len(self._prompts)
            self._prompts[slot] = row.prompt_tokens
            self._outputs[slot] = row.output_tokens
            self._seen += 1

    def estimate(self, observation: Observation) -> Moments:
        """Moments over the remembered rows and the live rows of ``observation``.

        Raises:
            ValueError: nothing has finished and nothing lives, so that there is nothing to go by.
        """
        known = min(self._seen, len(self._prompts))
        if known + observation.live_rows == 0:
            raise ValueError("Row lengths cannot be estimated before the first row lives.")
        prompts = np.concatenate((self._prompts[:known], observation.prompt_tokens))
        output_mean, output_variance = _censored_moments(
            self._outputs[:known], observation.generated_tokens, observation.max_new_tokens
        )
        return Moments(float(prompts.mean()), float(prompts.var()), output_mean, output_variance)


def _censored_moments(finished: IntArray, ages: IntArray, limits: IntArray) -> tuple[float, float]:
    """Mean and variance of a length seen in full in ``finished`` and at least ``ages`` long in live rows.

    ``limits`` are the greatest lengths that the live rows may reach. All arrays are in tokens.
    """
    lengths = np.concatenate((finished, ages))
    ended = np.zeros(len(lengths), dtype=bool)
    ended[: len(finished)] = True
    # At a tie the finished length goes first: a live row of that age is going to be longer.
    order = np.lexsort((~ended, lengths))
    at_risk = len(lengths) - np.arange(len(lengths))
    survival = np.cumprod(1.0 - ended[order] / at_risk)

    values: NDArray[np.float64] = lengths[order].astype(np.float64)
    spreads = np.zeros_like(values)
    weights = -np.diff(survival, prepend=1.0)
    last_finished = int(np.flatnonzero(ended[order])[-1]) if len(finished) else -1
    older = slice(last_finished + 1, None)
    if len(values[older]):
        limit = np.maximum(limits[order[older] - len(finished)], values[older])
        spreads[older] = (limit - values[older]) ** 2 / 12
        values[older] = (limit + values[older]) / 2
        weights[older] = survival[-1] / len(values[older])
    mean = float(weights @ values)
    return mean, float(weights @ (spreads + (values - mean) ** 2))
