"""A fixed batch: the baseline that every other policy is measured against."""

from __future__ import annotations

from rollout.batcher.types import Bounds, Decision, Observation


class StaticPolicy:
    """Always ``bounds.max_rows`` rows; only the engine's memory gate holds them back."""

    def __init__(self, bounds: Bounds) -> None:
        self._decision = Decision(bounds.max_rows, bounds.prefill_tokens, "cap")

    def decide(self, observation: Observation) -> Decision:  # noqa: ARG002 - the protocol's signature
        return self._decision
