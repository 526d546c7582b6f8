"""Mean and variance of prompt and output lengths, learned while rows run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rollout.batcher.types import FinishedRow, FloatArray, IntArray, Observation


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of the lengths of a single row, in tokens and tokens squared."""

    prompt_mean: float
    prompt_variance: float
    output_mean: float
    output_variance: float

    @property
    def mean(self) -> float:
        """Mean of prompt plus output: mu in equation 12 of arXiv 2503.05248."""
        return self.prompt_mean + self.output_mean

    @property
    def sd(self) -> float:
        """Standard deviation of prompt plus output, assumed independent: sigma in equation 12."""
        return math.sqrt(self.prompt_variance + self.output_variance)


class LengthMoments:
    """Moments of row lengths over the last finished rows and the live rows.

    Short rows finish first, so the mean of finished outputs is too small while a job is young. Live rows are
    therefore counted as right-censored lengths, by the Kaplan-Meier estimator in Efron's form: the live rows older
    than the last finished length share the probability that remains after it. The prior of the tokens that such a
    row still generates is uniform up to its own ``max_new_tokens``. Before any row finishes, new rows thus count as
    half of ``max_new_tokens``, and the prior fades as rows finish.

    Prompt lengths are known, so their moments need no censoring. Waiting prompts are excluded: observations count a
    prompt shared by several rows once, which would make rows look shorter than they become.

    Args:
        length_window: finished rows to remember; older rows are forgotten, so that the estimate follows a drift.

    Raises:
        ValueError: ``length_window`` is less than 1.
    """

    def __init__(self, length_window: int = 1024) -> None:
        if length_window < 1:
            raise ValueError(f"length_window must be at least 1, not {length_window}.")
        self._prompts: IntArray = np.zeros(length_window, dtype=np.int64)
        self._outputs: IntArray = np.zeros(length_window, dtype=np.int64)
        self._seen = 0

    def learn(self, finished: Iterable[FinishedRow]) -> None:
        """Add the lengths of rows that finished."""
        for row in finished:
            index = self._seen % len(self._prompts)
            self._prompts[index] = row.prompt_tokens
            self._outputs[index] = row.output_tokens
            self._seen += 1

    def estimate(self, observation: Observation) -> Moments:
        """Return the moments over the remembered rows and the live rows.

        Raises:
            ValueError: no row has finished and no row is live.
        """
        remembered = min(self._seen, len(self._prompts))
        if remembered + observation.live_rows == 0:
            raise ValueError("Row lengths cannot be estimated before the first row is live.")
        prompts = np.concatenate((self._prompts[:remembered], observation.prompt_tokens))
        output = _censored_moments(
            finished=self._outputs[:remembered],
            ages=observation.generated_tokens,
            limits=observation.max_new_tokens,
        )
        return Moments(
            prompt_mean=float(prompts.mean()),
            prompt_variance=float(prompts.var()),
            output_mean=output.mean,
            output_variance=output.variance,
        )


class _MeanVariance(NamedTuple):
    mean: float
    variance: float


def _censored_moments(finished: IntArray, ages: IntArray, limits: IntArray) -> _MeanVariance:
    """Return the Kaplan-Meier mean and variance of lengths, in tokens.

    Args:
        finished: [finished rows] lengths.
        ages: [live rows] lengths so far.
        limits: [live rows] greatest lengths that the live rows may reach.
    """
    lengths = np.concatenate((finished, ages))
    ended = np.zeros(len(lengths), dtype=bool)
    ended[: len(finished)] = True
    # At a tie the finished row comes first, because the live row of that age is going to be longer.
    order = np.lexsort((~ended, lengths))
    at_risk = len(lengths) - np.arange(len(lengths))
    survival = np.cumprod(1.0 - ended[order] / at_risk)

    values: FloatArray = lengths[order].astype(np.float64)
    variances = np.zeros_like(values)
    weights = -np.diff(survival, prepend=1.0)
    last_finished = int(np.flatnonzero(ended[order])[-1]) if len(finished) else -1
    older = slice(last_finished + 1, None)
    if len(values[older]):
        limit = np.maximum(limits[order[older] - len(finished)], values[older])
        variances[older] = (limit - values[older]) ** 2 / 12
        values[older] = (limit + values[older]) / 2
        weights[older] = survival[-1] / len(values[older])
    mean = float(weights @ values)
    return _MeanVariance(mean=mean, variance=float(weights @ (variances + (values - mean) ** 2)))
