"""Policies by name, as the configuration and the library call give them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rollout.batcher.policies.memory import MemoryPolicy
from rollout.batcher.policies.paper import PaperPolicy
from rollout.batcher.policies.predictive import PredictivePolicy
from rollout.batcher.policies.sla import SlaPolicy
from rollout.batcher.policies.static import StaticPolicy
from rollout.batcher.types import Bounds, Policy

POLICIES: Mapping[str, Callable[..., Policy]] = {
    "static": StaticPolicy,
    "memory": MemoryPolicy,
    "sla": SlaPolicy,
    "paper": PaperPolicy,
    "predictive": PredictivePolicy,
}


def make_policy(name: str, bounds: Bounds, **parameters: Any) -> Policy:
    """The policy called ``name``, within ``bounds``, with parameters of its own.

    Raises:
        ValueError: the name or a parameter is unknown, or a value is out of range; the message says which and
            what would be right.
    """
    if not 1 <= bounds.min_rows <= bounds.max_rows:
        raise ValueError(f"min_rows is {bounds.min_rows}, but must be from 1 to max_rows ({bounds.max_rows}).")
    if name not in POLICIES:
        raise ValueError(f"There is no policy {name!r}; {_instead(name, POLICIES)}.")
    make = POLICIES[name]
    known = [parameter for parameter in inspect.signature(make).parameters if parameter != "bounds"]
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(f"The policy {name!r} has no parameter {parameter!r}; {_instead(parameter, known)}.")
    return make(bounds, **parameters)


def _instead(wrong: str, names: Iterable[str]) -> str:
    known = list(names)
    if not known:
        return "it has none"
    nearest = difflib.get_close_matches(wrong, known, n=1, cutoff=0.0)[0]
    return f"the nearest is {nearest!r} (known: {', '.join(known)})"
