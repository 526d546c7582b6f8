"""Memory in pages: pages lie inside slabs, which are ordinary torch allocations.

A pool grows by a slab and shrinks by dropping empty ones. A page id is ``slab * slab_pages + offset``
and stays valid while its slab lives; pages that several rows share carry a reference count. A page holds
the keys and values of a few tokens, or, in a pool of its own, the recurrent state of one row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from rollout.models.arrays import IntArray, uploaded

#: Pages that are copied in one go; a model's keys at one site take some kilobytes a page.
_COPIED_TOGETHER = 64


class PoolExhausted(RuntimeError):
    """More pages were asked for than are free; the caller checks ``free_pages`` first."""


class _Slab(Protocol):
    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that the slab holds: ``[pages, ...]`` each."""
        ...


_S = TypeVar("_S", bound=_Slab)


class Pool(ABC, Generic[_S]):
    """Pages, whatever they hold.

    Args:
        page_bytes: what a page takes; 0 when there is nothing to hold, and then no page is ever asked for.
        slab_pages: pages a slab.
        device: where slabs are allocated.
    """

    def __init__(self, page_bytes: int, slab_pages: int, device: torch.device) -> None:
        self.page_bytes = page_bytes
        self.slab_pages = slab_pages
        self.device = device
        self.slabs: list[_S | None] = []
        self._references: IntArray = np.zeros(0, np.int64)
        self._free: list[list[int]] = []  # free page ids of each slab, highest first
        self._free_count = 0

    @abstractmethod
    def _allocate_slab(self) -> _S:
        """A slab of `slab_bytes`."""

    # -- sizes -------------------------------------------------------------------------------------

    @property
    def slab_bytes(self) -> int:
        return self.slab_pages * self.page_bytes

    @property
    def bytes_held(self) -> int:
        return self.live_slabs * self.slab_bytes

    @property
    def live_slabs(self) -> int:
        return sum(slab is not None for slab in self.slabs)

    @property
    def free_pages(self) -> int:
        return self._free_count

    @property
    def used_pages(self) -> int:
        return self.live_slabs * self.slab_pages - self._free_count

    # -- growing and shrinking -----------------------------------------------------------------------

    def grow(self, agree: Callable[[bool], bool] = bool) -> bool:
        """Adds one slab, if others who must have one too ``agree``; they are told whether there is memory for this one.

        Raises:
            torch.OutOfMemoryError, RuntimeError: the allocator refuses; the pool is as it was.
        """
        try:
            slab = self._allocate_slab()
        except (RuntimeError, MemoryError):
            agree(False)
            raise
        if not agree(True):
            return False
        index = next((i for i, held in enumerate(self.slabs) if held is None), len(self.slabs))
        if index == len(self.slabs):
            self.slabs.append(None)
            self._free.append([])
            self._references = np.concatenate([self._references, np.zeros(self.slab_pages, np.int64)])
        self.slabs[index] = slab
        first = index * self.slab_pages
        self._free[index] = list(range(first + self.slab_pages - 1, first - 1, -1))
        self._free_count += self.slab_pages
        return True

    def shrink(self, tables: Iterable[IntArray]) -> bool:
        """Drops the emptiest slab, after moving its pages to others; ``tables`` are rewritten in place.

        Returns False, with nothing changed, when the other slabs have no room for its pages.
        """
        held = [i for i, slab in enumerate(self.slabs) if slab is not None]
        if not held:
            return False
        victim = max(held, key=lambda i: len(self._free[i]))
        used = self.slab_pages - len(self._free[victim])
        if used > self._free_count - len(self._free[victim]):
            return False
        self._free_count -= len(self._free[victim])
        self._free[victim] = []
        if used:
            first = victim * self.slab_pages
            source = first + np.flatnonzero(self._references[first : first + self.slab_pages])
            target = self.allocate(used)
            self._references[target] = self._references[source]
            self._references[source] = 0
            self.copy(source, target)
            moved = np.arange(len(self._references))
            moved[source] = target
            for table in tables:
                table[:] = moved[table]
        self.slabs[victim] = None
        while self.slabs and self.slabs[-1] is None:
            self.slabs.pop()
            self._free.pop()
            self._references = self._references[: len(self.slabs) * self.slab_pages]
        return True

    # -- pages ---------------------------------------------------------------------------------------

    def allocate(self, count: int) -> IntArray:
        """Takes ``count`` free pages, lowest slabs first, so that the highest run empty.

        Raises:
            PoolExhausted: fewer are free.
        """
        if count > self._free_count:
            raise PoolExhausted(f"{count} pages wanted, {self._free_count} free")
        taken: list[int] = []
        for free in self._free:
            while free and len(taken) < count:
                taken.append(free.pop())
            if len(taken) == count:
                break
        self._free_count -= count
        pages = np.asarray(taken, np.int64)
        self._references[pages] = 1
        return pages

    def share(self, pages: IntArray) -> None:
        """One more row holds ``pages``."""
        self._references[pages] += 1

    def release(self, pages: IntArray, scrub: bool = False) -> None:
        """One row fewer holds ``pages``; those that nobody holds are free again.

        With ``scrub`` those are zeroed: after a row with non-finite values, lest a later holder multiplies
        a weight of 0 by NaN.
        """
        self._references[pages] -= 1
        freed = pages[self._references[pages] == 0]
        for page in freed.tolist():
            self._free[page // self.slab_pages].append(page)
        self._free_count += len(freed)
        if scrub:
            for slab in np.unique(freed // self.slab_pages).tolist():
                tensors = self.slab(slab).tensors
                inside = _on_devices(freed[freed // self.slab_pages == slab] % self.slab_pages, tensors)
                for tensor in tensors:
                    tensor.index_fill_(0, inside[tensor.device], 0)

    def copy(self, source: IntArray, target: IntArray) -> None:
        """Copies the contents of pages, no two of which may have one target, nor be both source and target.

        Many at a time: a launch for each tensor of each page would keep a GPU waiting. But not more than take little
        memory on the way, since pages move when there is none.
        """
        slabs = np.stack([source, target]) // self.slab_pages
        for from_slab, to_slab in np.unique(slabs, axis=1).T.tolist():
            between = np.flatnonzero((slabs[0] == from_slab) & (slabs[1] == to_slab))
            for start in range(0, len(between), _COPIED_TOGETHER):
                pages = between[start : start + _COPIED_TOGETHER]
                inside = source[pages] % self.slab_pages, target[pages] % self.slab_pages
                _copy(self.slab(from_slab).tensors, self.slab(to_slab).tensors, *inside)

    def slab(self, index: int) -> _S:
        """The slab with this index.

        Raises:
            IndexError, AssertionError: it was dropped.
        """
        slab = self.slabs[index]
        assert slab is not None, f"slab {index} was dropped"
        return slab

    def check_integrity(self, tables: Iterable[IntArray]) -> None:
        """Every page is free or held by exactly as many ``tables`` as its count says; for tests."""
        counts = np.zeros_like(self._references)
        for table in tables:
            np.add.at(counts, table, 1)
        if not np.array_equal(counts, self._references):
            wrong = np.flatnonzero(counts != self._references)
            raise AssertionError(f"pages {wrong[:8].tolist()} have wrong reference counts")
        free = sorted(page for pages in self._free for page in pages)
        live = [i for i, slab in enumerate(self.slabs) if slab is not None]
        every = {slab * self.slab_pages + offset for slab in live for offset in range(self.slab_pages)}
        held = set(np.flatnonzero(counts).tolist())
        if len(free) != self._free_count or sorted([*free, *held]) != sorted(every):
            raise AssertionError("free and held pages do not make up the slabs")


def _copy(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], source: IntArray, target: IntArray) -> None:
    """From pages ``source`` of the tensors of one slab to pages ``target`` of those of one."""
    if len(source) == 1:
        for from_tensor, to_tensor in zip(sources, targets, strict=True):
            to_tensor[int(target[0])].copy_(from_tensor[int(source[0])])
        return
    given, wanted = _on_devices(source, targets), _on_devices(target, targets)
    for from_tensor, to_tensor in zip(sources, targets, strict=True):
        device = to_tensor.device
        to_tensor.index_copy_(0, wanted[device], from_tensor.index_select(0, given[device]))


def _on_devices(pages: IntArray, tensors: Iterable[torch.Tensor]) -> dict[torch.device, torch.Tensor]:
    """The pages where they are to be indices."""
    return {device: uploaded(pages, device) for device in {tensor.device for tensor in tensors}}
