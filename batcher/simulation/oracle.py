"""What knowing all lengths would be worth: a bound for policies, not one of them."""

from __future__ import annotations

from rollout.batcher.estimators.peak_memory import rows_that_fit
from rollout.batcher.estimators.row_memory import live_rows, waiting_rows
from rollout.batcher.types import Bounds, Decision, Observation


class OraclePolicy:
    """As many rows, in the order of arrival, as never outgrow memory, given their true lengths as limits.

    Never to outgrow memory is not always the best one can do: to admit a little more and compute some rows again may
    be faster.

    Args:
        bounds: what the user allows.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds

    def decide(self, observation: Observation) -> Decision:
        live, shared = live_rows(observation)
        more = rows_that_fit(
            live=live, shared=shared, waiting=waiting_rows(observation), kv_tokens=observation.kv_tokens_total
        )
        rows = min(max(observation.live_rows + more, self._bounds.min_rows), self._bounds.max_rows)
        return Decision(rows, self._bounds.prefill_tokens, "memory" if rows < self._bounds.max_rows else "cap")
