"""Policies by name, for the configuration and for library calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from rollout.batcher.policies.memory import MemoryParameters, MemoryPolicy
from rollout.batcher.policies.paper import PaperParameters, PaperPolicy
from rollout.batcher.policies.predictive import PredictiveParameters, PredictivePolicy
from rollout.batcher.policies.sla import SlaParameters, SlaPolicy
from rollout.batcher.policies.static import StaticPolicy
from rollout.batcher.suggestions import describe_names
from rollout.batcher.types import Bounds, Policy

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
