"""Offline batch generation for RL rollouts and bulk inference.

`Engine` generates on a live transformers module; ``python -m rollout`` runs whole jobs with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollout.engine.engine import Engine
    from rollout.records import Batch, Record
    from rollout.sampling_params import SamplingParams

__all__ = ["Batch", "Engine", "Record", "SamplingParams"]

_HOMES = {"Batch": "records", "Engine": "engine.engine", "Record": "records", "SamplingParams": "sampling_params"}


def __getattr__(name: str) -> Any:
    """Imports on first use: a job refuses bad input before torch and transformers are imported."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rollout' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"rollout.{_HOMES[name]}"), name)
