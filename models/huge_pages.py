"""CPU memory in huge pages: with small ones, much of the time of reading a large array goes into finding its pages."""

from __future__ import annotations

import mmap
import threading
import weakref
from contextlib import suppress

import torch

from rollout.models.arrays import ceil_div

HUGE_PAGE = 1 << 21
_BLOCK_BYTES = 1 << 25
_ALIGNMENT = 64


def huge_empty(size: int) -> torch.Tensor:
    """Return new memory, [size] uint8 on the CPU, in huge pages if it fills one and the system has them.

    Raises:
        MemoryError, RuntimeError: there is not so much memory.
    """
    if size < HUGE_PAGE:
        return torch.empty(size, dtype=torch.uint8)
    memory = _map(size)
    return torch.frombuffer(memory, dtype=torch.uint8, offset=_first(memory), count=size)


class Arena:
    """Cuts blocks of huge pages into pieces, so that pieces smaller than a huge page lie in one as well.

    A block is freed with the last of its pieces.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block: weakref.ref[mmap.mmap] | None = None
        self._next = 0
        """Where the next piece begins in the block."""

    def empty(self, size: int) -> torch.Tensor:
        """Return new memory, [size] uint8 on the CPU, aligned to 64 bytes.

        Raises:
            MemoryError: there is not so much memory.
        """
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        with self._lock:
            block = None if self._block is None else self._block()
            if block is None or self._next + size > len(block):
                block = _map(max(size, _BLOCK_BYTES))
                self._block, self._next = weakref.ref(block), _first(block)
            piece = torch.frombuffer(block, dtype=torch.uint8, offset=self._next, count=size)
            self._next += ceil_div(size, _ALIGNMENT) * _ALIGNMENT
        return piece


def _map(size: int) -> mmap.mmap:
    """Map memory that has ``size`` bytes from its first huge page on. What is not used takes no memory."""
    length = (ceil_div(size, HUGE_PAGE) + 1) * HUGE_PAGE
    try:
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{length:,} bytes of memory are not there") from error
    # A system without huge pages keeps its small ones.
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _first(memory: mmap.mmap) -> int:
    """Return where the first huge page begins."""
    return -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
