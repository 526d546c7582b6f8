"""Paged memory: pages lie inside slabs, which are ordinary torch allocations.

A pool grows by one slab at a time and shrinks by dropping slabs. A page id is ``slab * slab_pages + offset`` and stays
valid while its slab exists; pages have reference counts, since rows share them. A page holds the keys and values of
``page_size`` tokens or, in a `StatePool`, the recurrent states of one row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from rollout.models.arrays import IntArray, uploaded

#: Pages copied per launch; the keys of one layer take some kilobytes per page.
_PAGES_PER_COPY = 64


class PoolExhausted(RuntimeError):
    """Fewer pages are free than were requested; callers check ``free_pages`` first."""


class _Slab(Protocol):
    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors of the slab, [pages, ...] each."""
        ...


_S = TypeVar("_S", bound=_Slab)


class Pool(ABC, Generic[_S]):
    """Reference-counted pages in slabs that are allocated and dropped as needed.

    Args:
        page_bytes: bytes per page; 0 if the model stores nothing here, and then no page is ever allocated.
        slab_pages: pages per slab.
        device: where slabs are allocated.
    """

    def __init__(self, page_bytes: int, slab_pages: int, device: torch.device) -> None:
        self.page_bytes = page_bytes
        self.slab_pages = slab_pages
        self.device = device
        self.slabs: list[_S | None] = []
        self.live_slabs = 0
        self.slab_changes = 0
        """Counts up whenever a slab is added or dropped."""
        self._references: IntArray = np.zeros(0, np.int64)
        self.reference_changes = 0
        """Counts up whenever pages in use gain or lose references."""
        self._free: list[list[int]] = []  # per slab: free page ids, highest first
        self._free_count = 0

    @abstractmethod
    def _allocate_slab(self) -> _S:
        """Allocate a slab of `slab_bytes`."""

    # -- sizes -------------------------------------------------------------------------------------

    @property
    def slab_bytes(self) -> int:
        return self.slab_pages * self.page_bytes

    @property
    def bytes_held(self) -> int:
        return self.live_slabs * self.slab_bytes

    @property
    def free_pages(self) -> int:
        return self._free_count

    @property
    def used_pages(self) -> int:
        return self.live_slabs * self.slab_pages - self._free_count

    # -- growing and shrinking -----------------------------------------------------------------------

    def grow(self, agree: Callable[[bool], bool] = bool) -> bool:
        """Add one slab; return False, with nothing changed, if another rank cannot.

        Args:
            agree: receives whether this rank allocated its slab; returns whether all ranks did.

        Raises:
            torch.OutOfMemoryError, RuntimeError: the allocation failed; the pool is unchanged.
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
        self.live_slabs += 1
        self.slab_changes += 1
        first = index * self.slab_pages
        self._free[index] = list(range(first + self.slab_pages - 1, first - 1, -1))
        self._free_count += self.slab_pages
        return True

    def shrink(self, tables: Iterable[IntArray]) -> bool:
        """Move the pages of the emptiest slab to other slabs and drop it; rewrite ``tables`` in place.

        Returns False, with nothing changed, if the other slabs have too few free pages.

        Raises:
            torch.OutOfMemoryError, RuntimeError: the pages could not be copied; nothing is changed.
        """
        live = [i for i, slab in enumerate(self.slabs) if slab is not None]
        if not live:
            return False
        victim = max(live, key=lambda i: len(self._free[i]))
        used = self.slab_pages - len(self._free[victim])
        if used > self._free_count - len(self._free[victim]):
            return False
        free, self._free[victim] = self._free[victim], []
        self._free_count -= len(free)
        if used:
            first = victim * self.slab_pages
            source = first + np.flatnonzero(self._references[first : first + self.slab_pages])
            target = self.allocate(used)
            try:
                self.copy(source, target)
            except (RuntimeError, MemoryError):
                self.release(target)
                self._free[victim] = free
                self._free_count += len(free)
                raise
            self._references[target] = self._references[source]
            self._references[source] = 0
            moved = np.arange(len(self._references))
            moved[source] = target
            for table in tables:
                table[:] = moved[table]
        self.slabs[victim] = None
        self.live_slabs -= 1
        self.slab_changes += 1
        while self.slabs and self.slabs[-1] is None:
            self.slabs.pop()
            self._free.pop()
            self._references = self._references[: len(self.slabs) * self.slab_pages]
        return True

    # -- pages ---------------------------------------------------------------------------------------

    def allocate(self, count: int) -> IntArray:
        """Take ``count`` free pages, lowest slabs first, so that the highest slabs become empty.

        Raises:
            PoolExhausted: fewer pages are free.
        """
        if count > self._free_count:
            raise PoolExhausted(f"{count} pages were requested, but only {self._free_count} are free.")
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

    def references(self, pages: IntArray) -> IntArray:
        """Return how often each of ``pages`` is in use."""
        counts: IntArray = self._references[pages]
        return counts

    def share(self, pages: IntArray) -> None:
        """Add one reference to each of ``pages``."""
        if not len(pages):
            return
        self._references[pages] += 1
        self.reference_changes += 1

    def release(self, pages: IntArray, scrub: bool = False) -> None:
        """Drop one reference to each of ``pages`` and free those without references.

        With ``scrub``, freed pages are zeroed: a row left non-finite values in them, and 0 times NaN is NaN, so a
        masked key of a later row would spoil its output.
        """
        if not len(pages):
            return
        self._references[pages] -= 1
        self.reference_changes += 1
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

    def copy(self, source: IntArray, target: IntArray, tokens: int | None = None) -> None:
        """Copy the contents of pages ``source`` [n] to ``target`` [n]; targets are unique and no page is in both.

        If ``tokens`` is given, only the keys and values of so many tokens are copied, the first of each page.

        Pages are copied in batches, since a launch per page and tensor would leave a GPU idle. Batches are small,
        since pages move when memory is short.
        """
        if not len(source):
            return
        slabs = np.stack([source, target]) // self.slab_pages
        for from_slab, to_slab in np.unique(slabs, axis=1).T.tolist():
            pairs = np.flatnonzero((slabs[0] == from_slab) & (slabs[1] == to_slab))
            for start in range(0, len(pairs), _PAGES_PER_COPY):
                pages = pairs[start : start + _PAGES_PER_COPY]
                _copy(
                    sources=_beginnings(self.slab(from_slab).tensors, tokens),
                    targets=_beginnings(self.slab(to_slab).tensors, tokens),
                    source=source[pages] % self.slab_pages,
                    target=target[pages] % self.slab_pages,
                )

    def slab(self, index: int) -> _S:
        """Return the slab with this index.

        Raises:
            IndexError, AssertionError: the slab was dropped.
        """
        slab = self.slabs[index]
        assert slab is not None, f"slab {index} was dropped"
        return slab

    def check_integrity(self, tables: Iterable[IntArray]) -> None:
        """Check that every page is free, or named by as many ``tables`` entries as its count says; for tests.

        Raises:
            AssertionError: counts, free lists or their sizes are wrong.
        """
        if self.live_slabs != sum(slab is not None for slab in self.slabs):
            raise AssertionError(f"{self.live_slabs} slabs are counted, but there are others")
        if len(self._free) != len(self.slabs) or len(self._references) != len(self.slabs) * self.slab_pages:
            raise AssertionError(
                f"{len(self.slabs)} slabs of {self.slab_pages} pages have {len(self._free)} free lists and "
                f"{len(self._references)} reference counts"
            )
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


def _beginnings(tensors: Sequence[torch.Tensor], tokens: int | None) -> Sequence[torch.Tensor]:
    """Return views of the first tokens of each page, or of the whole pages."""
    return tensors if tokens is None else [tensor[:, :tokens] for tensor in tensors]


def _copy(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], source: IntArray, target: IntArray) -> None:
    """Copy pages ``source`` of one slab's tensors to pages ``target`` of another's."""
    if len(source) == 1:
        for from_tensor, to_tensor in zip(sources, targets, strict=True):
            to_tensor[int(target[0])].copy_(from_tensor[int(source[0])])
        return
    from_pages, to_pages = _on_devices(source, targets), _on_devices(target, targets)
    for from_tensor, to_tensor in zip(sources, targets, strict=True):
        device = to_tensor.device
        to_tensor.index_copy_(0, to_pages[device], from_tensor.index_select(0, from_pages[device]))


def _on_devices(pages: IntArray, tensors: Iterable[torch.Tensor]) -> dict[torch.device, torch.Tensor]:
    """Upload page indices to every device that has one of ``tensors``."""
    return {device: uploaded(pages, device) for device in {tensor.device for tensor in tensors}}
