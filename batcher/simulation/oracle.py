"""A reference policy that knows the true lengths of all rows."""

from __future__ import annotations

from rollout.batcher.estimators.peak_memory import rows_that_fit
from rollout.batcher.estimators.row_memory import live_rows, waiting_rows
from rollout.batcher.types import Bounds, Decision, Observation


class OraclePolicy:
    """Admit rows in order of arrival as long as memory never overflows, with true lengths given as limits.

    This is not an upper bound on the throughput: admitting slightly more and recomputing some rows may be faster.

    Args:
        bounds: limits set by the user.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds

    def decide(self, observation: Observation) -> Decision:
        """Return the most rows whose peak memory fits."""
        live, shared = live_rows(observation)
        more = rows_that_fit(
            live=live, shared=shared, waiting=waiting_rows(observation), kv_tokens=observation.kv_tokens_total
        )
        rows = min(max(observation.live_rows + more, self._bounds.min_rows), self._bounds.max_rows)
        return Decision(rows, self._bounds.prefill_tokens, "memory" if rows < self._bounds.max_rows else "cap")
