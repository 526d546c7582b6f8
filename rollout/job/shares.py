"""Which samples a busy worker hands to one that asks: those with which both are done the earliest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from rollout.batcher.estimators.step_time import Coefficients
from rollout.batcher.types import FloatArray
from rollout.run_dir.record_lines import SampleKey

LEAST_GAIN_SECONDS = 1.0
LEAST_GAIN_SHARE = 0.05
"""What a handover must save at least, in seconds and of the giver's time."""
HANDOVER_SECONDS = 1.0
"""From a decision to the taker's first step."""


class OpenSample(NamedTuple):
    """A sample that is not finished, and what it is expected to need."""

    key: SampleKey
    context: int
    """Tokens of its prompt and of its completion so far."""
    rest: float
    """Tokens that it is expected to generate yet."""
    begun: bool
    """Whether its context is in the giver's memory."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How long a worker takes: milliseconds of a step, and its most rows at a time."""

    step: float
    row: float
    kv_token: float
    prefill_token: float
    rows: int

    @classmethod
    def of(cls, costs: Coefficients, rows: int) -> Speed:
        return cls(*costs, rows=max(1, rows))

    @property
    def known(self) -> bool:
        return self.step + self.row + self.kv_token > 0


@dataclass(frozen=True, slots=True)
class Backlog:
    """What a worker has to do: the longest of its samples, and their sums."""

    longest: float = 0.0
    """Tokens."""
    tokens: float = 0.0
    ms: float = 0.0
    """Milliseconds for rows, their contexts and prefills: all but the steps' own."""

    def seconds(self, speed: Speed) -> float:
        """Return how long it takes, with as many rows at a time as fit."""
        return float(_seconds(speed, self.longest, self.tokens, self.ms))


def _seconds(speed: Speed, longest: Any, tokens: Any, ms: Any) -> Any:
    return (speed.step * np.maximum(longest, tokens / speed.rows) + ms) / 1e3


class _Terms(NamedTuple):
    """What samples cost a worker; arrays of one entry a sample."""

    rest: FloatArray
    ms: FloatArray


def _terms(samples: Sequence[OpenSample], speed: Speed, *, moved: bool) -> _Terms:
    rest = np.array([sample.rest for sample in samples], np.float64)
    context = np.array([sample.context for sample in samples], np.float64)
    computed = np.array([sample.begun and not moved for sample in samples], np.bool_)
    prefill = np.where(computed, 0.0, speed.prefill_token * context)
    return _Terms(rest, rest * (speed.row + speed.kv_token * (context + rest / 2)) + prefill)


def backlog_of(samples: Sequence[OpenSample], speed: Speed) -> Backlog:
    """Return what a worker has to do for its own samples."""
    if not samples:
        return Backlog()
    terms = _terms(samples, speed, moved=False)
    return Backlog(float(terms.rest.max()), float(terms.rest.sum()), float(terms.ms.sum()))


@dataclass(frozen=True, slots=True)
class Ask:
    """What a worker that asks says of itself."""

    backlog: Backlog
    speed: Speed | None
    """None if it has not generated yet; it is taken to be as fast as the giver."""

    def values(self) -> dict[str, Any]:
        """Return the ask as values of a file."""
        return {**asdict(self.backlog), "speed": None if self.speed is None else asdict(self.speed)}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Ask:
        """Read an ask.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        backlog = Backlog(*(float(values[field.name]) for field in fields(Backlog)))
        given = values["speed"]
        if given is None:
            return cls(backlog, None)
        costs = Coefficients(*(float(given[name]) for name in Coefficients._fields))
        return cls(backlog, Speed.of(costs, int(given["rows"])))


def chosen_share(samples: Sequence[OpenSample], giver: Speed, ask: Ask, takers: int = 1) -> list[OpenSample]:
    """Return the samples to hand over; none if that would not gain enough.

    Samples that have not begun go first, then those with the longest rest: their tokens pay most for a prefill. For a
    taker that is much faster the longest go before all others.

    Args:
        samples: all that the giver has, those that it begins last in front.
        takers: how many ask, this one counted: the others get their shares of what is left.
    """
    if not samples:
        return []
    taker = ask.speed if ask.speed is not None and ask.speed.known else giver
    alone = backlog_of(samples, giver).seconds(giver)
    least = max(LEAST_GAIN_SECONDS, LEAST_GAIN_SHARE * alone)
    best_seconds, best = alone - least, list[OpenSample]()
    not_begun_first = sorted(samples, key=lambda sample: (sample.begun, -sample.rest if sample.begun else 0.0))
    longest_first = sorted(samples, key=lambda sample: -sample.rest)
    for order in (not_begun_first, longest_first):
        seconds = _seconds_by_count(order, giver, taker, ask.backlog, takers)
        count = int(np.argmin(seconds)) + 1
        if seconds[count - 1] < best_seconds:
            best_seconds, best = float(seconds[count - 1]), order[:count]
    return best


def _seconds_by_count(
    order: Sequence[OpenSample], giver: Speed, taker: Speed, before: Backlog, takers: int
) -> FloatArray:
    """[samples] Return when both are done, if the first 1, 2, … samples are handed over."""
    kept, taken = _terms(order, giver, moved=False), _terms(order, taker, moved=True)
    # The longest that the giver keeps after the first 1, 2, … samples.
    longest_kept = np.append(np.maximum.accumulate(kept.rest[::-1])[::-1][1:], 0.0)
    left_tokens = kept.rest.sum() - np.cumsum(kept.rest)
    left_ms = kept.ms.sum() - np.cumsum(kept.ms)
    at_giver = _seconds(giver, longest_kept, left_tokens / takers, left_ms / takers)
    at_taker = HANDOVER_SECONDS + _seconds(
        taker,
        np.maximum(before.longest, np.maximum.accumulate(taken.rest)),
        before.tokens + np.cumsum(taken.rest),
        before.ms + np.cumsum(taken.ms),
    )
    seconds: FloatArray = np.maximum(at_giver, at_taker)
    return seconds
