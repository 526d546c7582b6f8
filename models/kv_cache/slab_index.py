"""Where tokens lie in the slabs of a pool: split by slab once, then used for every site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from rollout.models.arrays import IntArray, uploaded
from rollout.models.kv_cache.page_pool import PagePool


@dataclass(frozen=True, slots=True)
class _Part:
    """The slots that lie in one slab."""

    slab: int
    where: torch.Tensor | None
    """Positions among the slots; all of them, in order, when None."""
    inside: torch.Tensor
    """The slots, counted from the slab's start."""


@dataclass(frozen=True, slots=True)
class Slots:
    """Token slots of a pool: ``page * page_size + place in page``, in any order, also repeated."""

    pool: PagePool
    count: int
    parts: tuple[_Part, ...]

    @classmethod
    def of(cls, pool: PagePool, slots: IntArray) -> Self:
        """The slots [n], at least one."""

        def tensor(values: IntArray) -> torch.Tensor:
            return uploaded(values, pool.device)

        slabs, inside = np.divmod(slots, pool.slab_pages * pool.layout.page_size)
        held = np.unique(slabs)
        if len(held) == 1:
            return cls(pool, len(slots), (_Part(int(held[0]), None, tensor(inside)),))
        places = [(int(slab), np.flatnonzero(slabs == slab)) for slab in held]
        return cls(pool, len(slots), tuple(_Part(slab, tensor(at), tensor(inside[at])) for slab, at in places))

    def write(self, site: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes [n, kv_heads, dim] of one site; slots must differ from each other."""
        for part in self.parts:
            slab = self.pool.slab(part.slab)
            for memory, new in ((slab.keys[site], keys), (slab.values[site], values)):
                rows = new if part.where is None else new.index_select(0, part.where)
                memory.flatten(0, 1).index_copy_(0, part.inside, rows.to(memory.dtype))

    def read(self, site: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [n, kv_heads, dim] of one site."""
        slabs = [self.pool.slab(part.slab) for part in self.parts]
        return self._gather([slab.keys[site] for slab in slabs]), self._gather([slab.values[site] for slab in slabs])

    def _gather(self, memories: list[torch.Tensor]) -> torch.Tensor:
        memories = [memory.flatten(0, 1) for memory in memories]
        out = memories[0].new_empty(self.count, *memories[0].shape[1:])
        for part, memory in zip(self.parts, memories, strict=True):
            if part.where is None:
                torch.index_select(memory, 0, part.inside, out=out)
            else:
                out.index_copy_(0, part.where, memory.index_select(0, part.inside))
        return out
