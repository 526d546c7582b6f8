"""Memory in huge pages: it is as large as asked, aligned, apart from other pieces, and freed with its last piece."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest
import torch

from rollout.models import huge_pages
from rollout.models.huge_pages import HUGE_PAGE, Arena, huge_empty


def mapped_bytes() -> int:
    """Return the virtual memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@pytest.mark.parametrize("size", [0, 1, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 1, 5 * HUGE_PAGE - 1])
def test_memory_has_the_size_and_begins_with_a_huge_page(size: int) -> None:
    memory = huge_empty(size)
    assert (memory.shape, memory.dtype) == ((size,), torch.uint8)
    assert size < HUGE_PAGE or memory.data_ptr() % HUGE_PAGE == 0
    memory.fill_(7)
    assert int(memory.sum(dtype=torch.int64)) == 7 * size


def test_pieces_are_aligned_and_lie_apart() -> None:
    arena = Arena()
    sizes = [
        0,
        1,
        63,
        64,
        65,
        1_105_920,
        huge_pages._BLOCK_BYTES - 1,
        huge_pages._BLOCK_BYTES,
        3 * huge_pages._BLOCK_BYTES + 1,
    ]
    pieces = [arena.empty(size) for size in sizes for _ in range(2)]
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    assert [len(piece) for piece in pieces] == [size for size in sizes for _ in range(2)]
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces if len(piece))
    assert all(bool((piece == number).all()) for number, piece in enumerate(pieces))


def test_small_pieces_share_a_block_that_goes_with_the_last() -> None:
    arena = Arena()
    gc.collect()  # or what earlier tests left would go in between
    before = mapped_bytes()
    pieces = [arena.empty(1 << 20) for _ in range(16)]
    assert mapped_bytes() - before < 2 * huge_pages._BLOCK_BYTES
    last = pieces[7]
    last.fill_(1)
    del pieces
    gc.collect()
    assert int(last.sum(dtype=torch.int64)) == 1 << 20
    assert mapped_bytes() - before >= huge_pages._BLOCK_BYTES
    del last
    gc.collect()
    assert mapped_bytes() - before < huge_pages._BLOCK_BYTES
    assert len(arena.empty(10)) == 10


def test_more_than_there_is_raises_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="bytes of memory are not there"):
        huge_empty(1 << 60)
