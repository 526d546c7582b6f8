"""A fixed batch size: the baseline that the other policies are measured against."""

from __future__ import annotations

from rollout.batcher.types import Bounds, Decision, Observation


class StaticPolicy:
    """Always allow ``bounds.max_rows`` rows; only the engine's memory check admits fewer."""

    def __init__(self, bounds: Bounds) -> None:
        self._decision = Decision(bounds.max_rows, bounds.prefill_tokens, "cap")

    def decide(self, observation: Observation) -> Decision:  # noqa: ARG002 - the protocol's signature
        """Return the same decision every time."""
        return self._decision
