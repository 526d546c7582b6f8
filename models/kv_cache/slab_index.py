"""Global ids of a pool, split by slab once and then used for every site or state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout.models.arrays import IntArray, uploaded


@dataclass(frozen=True, slots=True)
class SlabShare:
    """The share of some global ids (of pages, or of slots in pages) that lies in one slab."""

    slab: int
    where: torch.Tensor | None
    """Positions among the ids; all of them, in order, when None."""
    inside: torch.Tensor
    """The ids, counted from the slab's start."""


def split_by_slab(ids: IntArray, unit: int, device: torch.device) -> tuple[SlabShare, ...]:
    """Split global ids [n], at least one, by slab, with ``unit`` ids to each."""
    slabs, inside = np.divmod(ids, unit)
    if (slabs == slabs[0]).all():
        return (SlabShare(int(slabs[0]), None, uploaded(inside, device)),)
    places = [(int(slab), np.flatnonzero(slabs == slab)) for slab in np.unique(slabs)]
    return tuple(SlabShare(slab, uploaded(at, device), uploaded(inside[at], device)) for slab, at in places)


def gather(shares: Sequence[SlabShare], memories: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """Copy the rows of each share's memory ``[ids of a slab, ...]`` to their places in ``out`` [n, ...]; return it."""
    for share, memory in zip(shares, memories, strict=True):
        if share.where is None:
            torch.index_select(memory, 0, share.inside, out=out)
        else:
            out.index_copy_(0, share.where, memory.index_select(0, share.inside))
    return out


def scatter(shares: Sequence[SlabShare], memories: Sequence[torch.Tensor], values: torch.Tensor) -> None:
    """Write ``values`` [n, ...] to the rows of each share's memory; ids must differ from each other."""
    for share, memory in zip(shares, memories, strict=True):
        rows = values if share.where is None else values.index_select(0, share.where)
        memory.index_copy_(0, share.inside, rows.to(memory.dtype))
