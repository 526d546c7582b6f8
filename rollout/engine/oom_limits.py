"""Limits on rows and prefill tokens after allocator failures."""

from __future__ import annotations

from dataclasses import replace

from rollout.batcher.types import Decision

#: Steps without an allocator failure after which the row limit is doubled.
_CALM_STEPS = 256


class OutOfMemoryLimits:
    """Halves rows, then prefills, with each allocator failure, and relaxes both when steps succeed again."""

    def __init__(self) -> None:
        self._rows: int | None = None
        self._prefill_tokens: int | None = None
        self._calm_steps = 0

    def apply(self, decision: Decision) -> Decision:
        """Return the decision with its row target limited."""
        if self._rows is None or decision.rows <= self._rows:
            return decision
        return replace(decision, rows=self._rows, reason="oom")

    def prefill_tokens(self, wanted: int) -> int:
        """Return ``wanted`` prefill tokens, limited."""
        return wanted if self._prefill_tokens is None else min(wanted, self._prefill_tokens)

    def halve_rows(self, live_rows: int) -> int:
        """Limit rows to half of ``live_rows`` and return the limit."""
        self._calm_steps = 0
        self._rows = live_rows // 2
        return self._rows

    def halve_prefill(self, longest_prefill: int) -> bool:
        """Halve the prefill limit, starting from the longest prefill. Return False if it cannot shrink."""
        self._calm_steps = 0
        if longest_prefill <= 1 or self._prefill_tokens == 1:
            return False
        self._prefill_tokens = min(longest_prefill, self._prefill_tokens or longest_prefill) // 2
        return True

    def relax(self) -> None:
        """Count a step without a failure; every 256th doubles the row limit and lifts the prefill limit."""
        self._calm_steps += 1
        if self._calm_steps % _CALM_STEPS == 0:
            self._rows = None if self._rows is None else 2 * self._rows
            self._prefill_tokens = None
