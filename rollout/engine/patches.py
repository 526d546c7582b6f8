"""The patches that make a module faster while the engine borrows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

from rollout.models.patches.linears import PackedLinears
from rollout.models.patches.norms_and_rope import FusedModules
from rollout.models.patches.shared_inputs import layers_with_shared_inputs

#: Share of the free memory for packed copies of linear weights; the rest is left to the KV cache.
_COPIES_SHARE = 0.5


def make_patches(
    model: nn.Module, free_bytes: float, *, has_states: bool
) -> Callable[[], AbstractContextManager[None]]:
    """Pack linear weights within the free memory, and return a context manager that applies all patches.

    Args:
        has_states: whether the model has recurrent states. They accumulate rounding differences, so such models keep
            their own kernels.
    """
    linears = PackedLinears(model, int(free_bytes * _COPIES_SHARE), layers_with_shared_inputs(model))
    fused = nullcontext if has_states else FusedModules(model).applied

    @contextmanager
    def applied() -> Iterator[None]:
        with linears.applied(), fused():
            yield

    return applied
