"""Hide from a policy where rows end, and measure how well it forecasts memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from rollout.batcher.estimators.memory_forecast import MemoryForecaster
from rollout.batcher.estimators.row_memory import live_rows
from rollout.batcher.estimators.survival import Survival
from rollout.batcher.types import Decision, Observation, Policy, StepSample

AHEAD = (16, 64, 256)
"""Horizons of the forecasts, in steps."""
_DECISIONS_PER_LOOK = 64
_KNOWN_AFTER = 16
"""Finished rows after which forecasts are judged."""


@dataclass(slots=True)
class Unaware:
    """Wrap a policy: hide where rows end, and keep the steps it observed.

    From time to time the tokens that the live rows will hold are foretold as `predictive` does it, and compared with
    what they will hold.
    """

    policy: Policy
    max_new: int
    """The limit that the policy sees for every row."""
    steps: list[StepSample] = field(default_factory=list)
    errors: list[tuple[float, ...]] = field(default_factory=list)
    """For each of `AHEAD`: forecast minus true tokens, as a share of memory."""
    _hazard: Survival = field(default_factory=Survival)
    _decisions: int = 0

    def decide(self, observation: Observation) -> Decision:
        """Return the decision of the wrapped policy."""
        self.steps += observation.steps
        hidden = self._hidden(observation)
        self._hazard.learn(hidden.finished)
        if self._decisions % _DECISIONS_PER_LOOK == 0 and self._hazard.finished >= _KNOWN_AFTER:
            self.errors.append(self._errors(hidden, observation))
        self._decisions += 1
        return self.policy.decide(hidden)

    def _hidden(self, observation: Observation) -> Observation:
        waiting = observation.waiting
        if waiting is not None:
            limits = np.full_like(waiting.max_new_tokens, self.max_new)
            waiting = replace(waiting, max_new_tokens=limits, ends_at_limit=np.zeros(len(waiting), np.bool_))
        return replace(
            observation,
            max_new_tokens=np.full_like(observation.max_new_tokens, self.max_new),
            ends_at_limit=None,
            waiting=waiting,
            finished=tuple(replace(row, cut=False) for row in observation.finished),
        )

    def _errors(self, hidden: Observation, observation: Observation) -> tuple[float, ...]:
        self._hazard.estimate(hidden.generated_tokens, self.max_new)
        foretold = MemoryForecaster(self._hazard, np.array(AHEAD, np.float64)).total(live_rows(hidden)[0]).mean
        rows, _ = live_rows(observation)
        true = [float((rows.own_tokens + steps)[rows.remaining > steps].sum()) for steps in AHEAD]
        return tuple(((foretold - true) / observation.kv_tokens_total).tolist())


def quantiles(errors: Iterable[tuple[float, ...]]) -> list[str]:
    """Return "median, p95" of the absolute error for each of `AHEAD`."""
    sizes = np.abs(np.array(list(errors)).reshape(-1, len(AHEAD)))
    if not len(sizes):
        return ["" for _ in AHEAD]
    return [f"{middle:.1%}, {high:.1%}" for middle, high in np.quantile(sizes, (0.5, 0.95), axis=0).T]
