"""Offline batch generation for RL rollouts and bulk inference.

`Engine` generates on a live transformers module; ``python -m rollout`` runs whole jobs with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollout.engine.engine import Engine
    from rollout.engine.session import Session
    from rollout.models.patches.batch_invariant import batch_invariant
    from rollout.records import Batch, Record
    from rollout.sampling_params import SamplingParams
    from rollout.stop_conditions import CallProgress, Deadline, FinishedPerPrompt
    from rollout.tokenization.prompt import Chat

__all__ = [
    "Batch",
    "CallProgress",
    "Chat",
    "Deadline",
    "Engine",
    "FinishedPerPrompt",
    "Record",
    "SamplingParams",
    "Session",
    "batch_invariant",
]

__version__: str

_MODULES = {
    "Batch": "records",
    "CallProgress": "stop_conditions",
    "Chat": "tokenization.prompt",
    "Deadline": "stop_conditions",
    "Engine": "engine.engine",
    "FinishedPerPrompt": "stop_conditions",
    "Record": "records",
    "SamplingParams": "sampling_params",
    "Session": "engine.session",
    "batch_invariant": "models.patches.batch_invariant",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that a job refuses bad input before importing torch and transformers."""
    if name == "__version__":
        from importlib.metadata import version

        return version("rollout")
    if name not in _MODULES:
        raise AttributeError(f"module 'rollout' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"rollout.{_MODULES[name]}"), name)
