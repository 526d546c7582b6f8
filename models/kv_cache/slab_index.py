"""Index arithmetic over slabs: ids of a pool are split by slab once, then used for every layer or state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout.models.arrays import IntArray, uploaded


@dataclass(frozen=True, slots=True)
class SlabShare:
    """The part of a list of pool-wide ids (pages or token slots) that lies in one slab."""

    slab: int
    where: torch.Tensor | None
    """Positions of these ids in the list; None if the slab holds the whole list."""
    inside: torch.Tensor
    """The ids relative to the slab's first."""


def split_by_slab(ids: IntArray, ids_per_slab: int, device: torch.device) -> tuple[SlabShare, ...]:
    """Split pool-wide ids [n], at least one, by slab."""
    slabs, inside = np.divmod(ids, ids_per_slab)
    if (slabs == slabs[0]).all():
        return (SlabShare(int(slabs[0]), None, uploaded(inside, device)),)
    shares = [(int(slab), np.flatnonzero(slabs == slab)) for slab in np.unique(slabs)]
    return tuple(SlabShare(slab, uploaded(where, device), uploaded(inside[where], device)) for slab, where in shares)


def gather(shares: Sequence[SlabShare], memories: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """Copy the entries of each share's memory [ids per slab, ...] to their positions in ``out`` [n, ...]; return it."""
    for share, memory in zip(shares, memories, strict=True):
        if share.where is None:
            torch.index_select(memory, 0, share.inside, out=out)
        else:
            out.index_copy_(0, share.where, memory.index_select(0, share.inside))
    return out


def scatter(shares: Sequence[SlabShare], memories: Sequence[torch.Tensor], values: torch.Tensor) -> None:
    """Write ``values`` [n, ...] to the entries of each share's memory; ids must be unique."""
    for share, memory in zip(shares, memories, strict=True):
        entries = values if share.where is None else values.index_select(0, share.where)
        memory.index_copy_(0, share.inside, entries.to(memory.dtype))
