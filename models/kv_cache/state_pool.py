"""Recurrent states of rows: one page of a pool of their own per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from rollout.models.arrays import IntArray
from rollout.models.kv_cache.layout import StateTensor
from rollout.models.kv_cache.pool import Pool
from rollout.models.kv_cache.slab_index import SlabShare, gather, scatter, split_by_slab


@dataclass(frozen=True, slots=True)
class StateSlab:
    """One allocation; ``tensors`` holds [pages, *shape] for each state of the layout."""

    tensors: tuple[torch.Tensor, ...]


class StatePool(Pool[StateSlab]):
    """A pool whose pages hold all recurrent states of one row. A page is written whole before it is read."""

    def __init__(self, states: tuple[StateTensor, ...], slab_pages: int, device: torch.device) -> None:
        super().__init__(sum(state.bytes for state in states), slab_pages, device)
        self.layout = states

    def _allocate_slab(self) -> StateSlab:
        memory = torch.empty(self.slab_bytes, dtype=torch.uint8, device=self.device)
        tensors: dict[int, torch.Tensor] = {}
        start = 0
        # Widest dtype first, so that each tensor starts at a multiple of its itemsize.
        for index in sorted(range(len(self.layout)), key=lambda i: -self.layout[i].dtype.itemsize):
            state = self.layout[index]
            end = start + self.slab_pages * state.bytes
            tensors[index] = memory[start:end].view(state.dtype).view(self.slab_pages, *state.shape)
            start = end
        return StateSlab(tuple(tensors[index] for index in range(len(self.layout))))


@dataclass(frozen=True, slots=True)
class StateRows:
    """The states of several rows: split by slab once, then used for every layer."""

    pool: StatePool
    count: int
    shares: tuple[SlabShare, ...]

    @classmethod
    def of(cls, pool: StatePool, pages: IntArray) -> Self:
        """Select the rows of these state ``pages`` [n], at least one, all different."""
        return cls(pool, len(pages), split_by_slab(pages, pool.slab_pages, pool.device))

    def read(self, index: int) -> torch.Tensor:
        """Return a copy [rows, *shape] of the ``index``-th state of the layout."""
        state = self.pool.layout[index]
        out = torch.empty(self.count, *state.shape, dtype=state.dtype, device=self.pool.device)
        return gather(self.shares, self._memories(index), out)

    def write(self, index: int, values: torch.Tensor) -> None:
        """Overwrite the ``index``-th state of the layout with ``values`` [rows, *shape]."""
        scatter(self.shares, self._memories(index), values)

    def _memories(self, index: int) -> list[torch.Tensor]:
        return [self.pool.slab(share.slab).tensors[index] for share in self.shares]
