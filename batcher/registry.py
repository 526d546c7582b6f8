"""Policies by name, for the configuration and for library calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, cast

from rollout.batcher.policies.memory import MemoryParameters, MemoryPolicy
from rollout.batcher.policies.paper import PaperParameters, PaperPolicy
from rollout.batcher.policies.predictive import PredictiveParameters, PredictivePolicy
from rollout.batcher.policies.sla import SlaParameters, SlaPolicy
from rollout.batcher.policies.static import StaticPolicy
from rollout.batcher.suggestions import describe_names
from rollout.batcher.types import Bounds, Decision, Observation, Policy

POLICIES: Mapping[str, Callable[..., Policy]] = {
    "static": StaticPolicy,
    "memory": MemoryPolicy,
    "sla": SlaPolicy,
    "paper": PaperPolicy,
    "predictive": PredictivePolicy,
}
PARAMETERS: Mapping[str, type] = {
    "memory": MemoryParameters,
    "sla": SlaParameters,
    "paper": PaperParameters,
    "predictive": PredictiveParameters,
}
"""The dataclass of each policy that takes parameters beside the bounds; its fields are the keys of ``batcher=NAME``."""


def make_policy(name: str, bounds: Bounds, **parameters: Any) -> Policy:
    """Build the policy ``name`` with its own parameters.

    Raises:
        ValueError: the name or a parameter is unknown, or a value is out of range.
    """
    if not 1 <= bounds.min_rows <= bounds.max_rows:
        raise ValueError(f"min_rows is {bounds.min_rows}, but must be from 1 to max_rows ({bounds.max_rows}).")
    if name not in POLICIES:
        raise ValueError(f"There is no policy {name!r}; {describe_names(name, POLICIES)}.")
    known = [field.name for field in fields(PARAMETERS[name])] if name in PARAMETERS else []
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(f"The policy {name!r} has no parameter {parameter!r}; {describe_names(parameter, known)}.")
    if name not in PARAMETERS:
        return POLICIES[name](bounds)
    return POLICIES[name](bounds, PARAMETERS[name](**parameters))


class BoundedPolicy:
    """Keeps the decisions of a caller's policy within the bounds on rows, and lets an idle engine prefill."""

    def __init__(self, policy: Policy, bounds: Bounds) -> None:
        self._policy = policy
        self._bounds = bounds

    def decide(self, observation: Observation) -> Decision:
        decision = self._policy.decide(observation)
        rows = min(max(decision.rows, self._bounds.min_rows), self._bounds.max_rows)
        # While no row decodes, a step without prefill would do nothing, and so would all further ones.
        prefill_tokens = (
            decision.prefill_tokens if observation.generated_tokens.any() else max(1, decision.prefill_tokens)
        )
        return replace(decision, rows=rows, prefill_tokens=prefill_tokens)


def bounded(policy: object, bounds: Bounds) -> Policy:
    """Hold a caller's own policy to the bounds on rows; those of this package have bounds already.

    Raises:
        ValueError: it is no policy, or there is a latency budget, which only policies made by name keep.
    """
    if isinstance(policy, type) or not callable(getattr(policy, "decide", None)):
        raise ValueError(
            f"policy is {policy!r}, but must be one of {', '.join(POLICIES)}, or an object with a method "
            "decide(observation)."
        )
    own = cast(Policy, policy)
    if type(own) in POLICIES.values():
        return own
    if bounds.latency_budget_ms is not None:
        raise ValueError(
            "latency_budget_ms is only for policies that are made by name: leave it out, and let your policy keep it."
        )
    return BoundedPolicy(own, bounds)
