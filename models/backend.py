"""Which attention reads the pages: the compiled kernel where it serves them, else gathering."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch

from rollout.models.attention import Scores
from rollout.models.compiled import CompiledAttention, Kernel, kernel
from rollout.models.gather import GatherStep
from rollout.models.packed import Packed
from rollout.models.paged import PagedStep
from rollout.models.pages import PagePool


class CompiledStep(PagedStep):
    """The compiled kernel writes new keys and values and attends to all, page by page, in place."""

    def __init__(self, pool: PagePool, packed: Packed, compiled: Kernel) -> None:
        super().__init__(pool, packed)
        self._attention = CompiledAttention(compiled, pool, packed.tables, packed.starts, packed.lengths)

    def compute(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        """See `PagedStep.compute`."""
        return self._attention(index, q, k, v, scores)


class Steps(Protocol):
    """Makes the step that answers the attention calls of one forward."""

    def __call__(self, pool: PagePool, packed: Packed) -> PagedStep: ...


def fastest(pool: PagePool) -> Steps:
    """The fastest attention for the layout and device of ``pool``."""
    compiled = kernel() if pool.device.type == "cpu" else None
    if compiled is not None and compiled.supports(pool.layout, pool.device):
        return partial(CompiledStep, compiled=compiled)
    return GatherStep
