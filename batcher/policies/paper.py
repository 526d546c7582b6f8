"""The combined policy of arXiv 2503.05248: the smaller batch of Algorithms 1 and 2."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.batcher.policies.memory import MemoryParameters, MemoryPolicy
from rollout.batcher.policies.sla import SlaParameters, SlaPolicy
from rollout.batcher.types import OVER_BUDGET, Bounds, Decision, Observation


@dataclass
class PaperParameters(SlaParameters, MemoryParameters):
    """Parameters of Algorithms 1 and 2; the keys of ``batcher=paper``."""


class PaperPolicy:
    """Run b* = min(b_mem, b_SLA) rows, and report the reason of the smaller one.

    ``over_budget`` is reported even where memory allows no more rows either, because the user must learn of it.

    Args:
        bounds: limits set by the user.
        parameters: None means the defaults.

    Raises:
        ValueError: a parameter is out of range.
    """

    def __init__(self, bounds: Bounds, parameters: PaperParameters | None = None) -> None:
        self._memory = MemoryPolicy(bounds, parameters)
        self._sla = SlaPolicy(bounds, parameters)

    def decide(self, observation: Observation) -> Decision:
        """Return the decision with fewer rows."""
        memory = self._memory.decide(observation)
        latency = self._sla.decide(observation)
        if latency.reason == OVER_BUDGET or latency.rows < memory.rows:
            return latency
        return memory
