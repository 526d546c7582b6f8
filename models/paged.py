"""One forward over pages: writes new keys and values, and lets a backend read what the pages hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from rollout.models.attention import Scores
from rollout.models.layout import IntArray, KVLayout
from rollout.models.pages import PagePool
from rollout.models.precision import cpu_multiplies


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of one sequence in a packed prefill: its tokens ``start .. start + length``."""

    pages: IntArray
    """[ceil((start + length) / page_size)] the sequence's pages, those to be written included."""
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class SlabPart:
    """The share of some global ids (of pages, or of slots in pages) that lies in one slab."""

    slab: int
    where: torch.Tensor | None
    """Positions among the ids; all of them, in order, when None."""
    inside: torch.Tensor
    """The ids, counted from the slab's start."""


class PagedStep(ABC):
    """Answers the attention calls of one forward, site by site in the order that the probe saw.

    What depends on lengths alone is planned once a step and serves every layer.

    Args:
        pool: where keys and values lie.
        slots: [tokens of the forward] where each goes: ``page * page_size + position in page``.
    """

    def __init__(self, pool: PagePool, slots: IntArray) -> None:
        self.pool = pool
        self.layout: KVLayout = pool.layout
        self.compute_dtype = _compute_dtype(pool)
        self._calls = 0
        self._writes = self.by_slab(slots, pool.slab_pages * pool.layout.page_size)

    def by_slab(self, ids: IntArray, unit: int) -> list[SlabPart]:
        """Splits global ids by slab, ``unit`` ids to each."""
        slabs, inside = np.divmod(ids, unit)
        if slabs[0] == slabs[-1] and (slabs == slabs[0]).all():
            return [SlabPart(int(slabs[0]), None, self.tensor(inside))]
        parts = [(int(slab), np.flatnonzero(slabs == slab)) for slab in np.unique(slabs)]
        return [SlabPart(slab, self.tensor(where), self.tensor(inside[where])) for slab, where in parts]

    def tensor(self, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
        """``values`` on the pool's device."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.pool.device)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,  # noqa: ARG002 - none is built for this implementation
        scores: Scores,
    ) -> torch.Tensor:
        """See `rollout.models.attention.Step`; either b or t of the tensors is 1.

        Raises:
            RuntimeError: the model's calls are not those that the probe saw.
        """
        index, self._calls = self._calls, self._calls + 1
        if index >= len(self.layout.sites) or self.layout.sites[index].module is not module:
            raise RuntimeError(f"{type(module).__name__} attends out of the order that the probe saw.")
        b, t = query.shape[0], query.shape[2]
        # [b, heads, t, dim] -> [tokens, heads, dim]
        q, k, v = (x.transpose(1, 2).flatten(0, 1).to(self.layout.dtype) for x in (query, key, value))
        for part in self._writes:
            for memory, new in ((self.keys(part.slab, index), k), (self.values(part.slab, index), v)):
                rows = new if part.where is None else new.index_select(0, part.where)
                memory.flatten(0, 1).index_copy_(0, part.inside, rows)
        return self.read(index, q, k, v, scores).view(b, t, query.shape[1], -1)

    def keys(self, slab: int, index: int) -> torch.Tensor:
        """[pages, page_size, kv_heads, key_dim] of one slab and site."""
        return self.pool.slab(slab).keys[index]

    def values(self, slab: int, index: int) -> torch.Tensor:
        """[pages, page_size, kv_heads, value_dim] of one slab and site."""
        return self.pool.slab(slab).values[index]

    @abstractmethod
    def read(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        """Attention of q [tokens, heads, key_dim] at site ``index``; k, v are what was just written.

        Returns [tokens, heads, value_dim], in any dtype that the model goes on with.
        """


def _compute_dtype(pool: PagePool) -> torch.dtype:
    """What attention is computed in: float32 for half precision that the CPU does not multiply itself."""
    slow = pool.device.type == "cpu" and not cpu_multiplies(pool.layout.dtype)
    return torch.float32 if slow else pool.layout.dtype
