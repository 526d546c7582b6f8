"""Groups of linear layers with the same input, observed in the probe of a strategy as the engine does."""

from __future__ import annotations

from torch import nn

from rollout.models.patches.shared_inputs import LinearGroup, shared_inputs
from rollout.models.runners.base import RunStrategy
from rollout.models.runners.packed import PackedStrategy


def groups_in_probe(
    model: nn.Module, strategy: type[RunStrategy] = PackedStrategy, *, on_gpu: bool = False
) -> list[LinearGroup]:
    """Return the groups that are observed while the strategy probes the model."""
    with shared_inputs(model, on_gpu=on_gpu) as groups:
        strategy(model).kv_layout()
    return groups
