"""Memory and latency together: the policy of arXiv 2503.05248."""

from __future__ import annotations

from rollout.batcher.policies.memory import Form, MemoryPolicy
from rollout.batcher.policies.sla import SlaPolicy
from rollout.batcher.types import OVER_BUDGET, Bounds, Decision, Observation


class PaperPolicy:
    """b* = min(b_mem, b_SLA): the tighter of Algorithms 1 and 2, with its reason.

    ``over_budget`` is said even where memory is as tight, for the user has to know. The parameters and errors
    are those of ``MemoryPolicy`` and ``SlaPolicy``.
    """

    def __init__(
        self,
        bounds: Bounds,
        epsilon_m: float = 0.05,
        form: Form = "eq12",
        length_window: int = 1024,
        alpha: int = 20,
        delta: int = 5,
        epsilon_d: float | None = None,
        step_window: int = 16,
    ) -> None:
        self._memory = MemoryPolicy(bounds, epsilon_m, form, length_window)
        self._latency = SlaPolicy(bounds, alpha, delta, epsilon_d, step_window)

    def decide(self, observation: Observation) -> Decision:
        memory = self._memory.decide(observation)
        latency = self._latency.decide(observation)
        if latency.reason == OVER_BUDGET or latency.rows < memory.rows:
            return latency
        return memory
