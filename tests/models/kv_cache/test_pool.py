"""Pages of a pool: who holds them, what a copy holds, and what shrinking moves."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from rollout.models.kv_cache import pool as slabs
from rollout.models.kv_cache.pool import PoolExhausted
from tests.support.kv_pages import entries, holds, pool_of, write

# -- pages -----------------------------------------------------------------------------------------------


def test_pages_come_from_the_lowest_slabs_first() -> None:
    pool = pool_of(2)
    first = pool.allocate(3)
    assert sorted(first.tolist()) == [0, 1, 2]
    second = pool.allocate(3)
    assert sorted(second.tolist()) == [3, 4, 5]
    pool.release(first)
    assert set(pool.allocate(3).tolist()) == {0, 1, 2}


def test_allocating_more_than_free_pages_raises_and_takes_none() -> None:
    pool = pool_of(1)
    table = pool.allocate(1)
    with pytest.raises(PoolExhausted, match="4 pages were requested, but only 3 are free"):
        pool.allocate(4)
    pool.check_integrity([table])
    assert pool.allocate(3).tolist() != []
    assert pool.allocate(0).tolist() == []
    with pytest.raises(PoolExhausted):
        pool.allocate(1)


def test_a_shared_page_is_free_when_the_last_holder_leaves() -> None:
    pool = pool_of(1)
    table = pool.allocate(2)
    pool.share(table[:1])
    pool.check_integrity([table, table[:1]])
    pool.release(table)
    pool.check_integrity([table[:1]])
    assert pool.free_pages == 3
    pool.release(table[:1])
    pool.check_integrity([])
    assert (pool.free_pages, pool.used_pages) == (4, 0)


def test_no_page_is_no_change_of_references() -> None:
    pool, none = pool_of(1), np.zeros(0, np.int64)
    table = pool.allocate(2)
    pool.share(none)
    pool.release(none, scrub=True)
    assert pool.reference_changes == 0
    pool.share(table)
    pool.release(table)
    assert pool.reference_changes == 2


def test_scrubbing_zeroes_what_becomes_free_and_nothing_else() -> None:
    pool = pool_of(2)
    table = pool.allocate(6)
    for page in table.tolist():
        write(pool, page, stamp=1 + page)
    kept, shared = table[:2], table[2:3]
    pool.share(shared)
    pool.release(table[2:], scrub=True)
    for page in (*kept.tolist(), *shared.tolist()):
        assert holds(pool, page, stamp=1 + page)
    for page in table[3:].tolist():
        assert not entries(pool, page).any()
    pool.release(shared)
    assert holds(pool, int(shared[0]), stamp=1 + int(shared[0])), "without scrub nothing is written"


def test_a_copy_holds_the_same_and_leaves_its_source() -> None:
    pool = pool_of(2)
    source, target = pool.allocate(3), pool.allocate(3)
    for page in source.tolist():
        write(pool, page, stamp=1 + page)
    pool.copy(source, target)
    for one, other in zip(source.tolist(), target.tolist(), strict=True):
        assert holds(pool, one, stamp=1 + one)
        assert holds(pool, other, stamp=1 + one)


def test_page_can_be_copied_to_many_targets_in_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page by itself would be a launch for each of its tensors."""
    monkeypatch.setattr(slabs, "_PAGES_PER_COPY", 3)
    pool = pool_of(4)
    source, target = pool.allocate(1), pool.allocate(7)
    write(pool, int(source[0]), stamp=5)
    calls: list[int] = []
    index_copy = torch.Tensor.index_copy_

    def counted(self: torch.Tensor, dim: int, index: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        calls.append(len(index))
        return index_copy(self, dim, index, given)

    monkeypatch.setattr(torch.Tensor, "index_copy_", counted)
    pool.copy(np.tile(source, 7), target)
    assert all(holds(pool, page, stamp=5) for page in (*source.tolist(), *target.tolist()))
    pages_a_slab = np.bincount(target // pool.slab_pages)
    rounds = [min(3, count - start) for count in pages_a_slab.tolist() for start in range(0, count, 3)]
    tensors = len(pool.slab(0).tensors)
    assert sorted(calls) == sorted(count for count in rounds if count > 1 for _ in range(tensors))


# -- shrinking -------------------------------------------------------------------------------------------


def test_shrinking_moves_pages_and_rewrites_every_table() -> None:
    pool = pool_of(2)
    low, high = pool.allocate(4), pool.allocate(1)
    pool.release(low[2:])
    pool.share(high)
    tables = [low[:2], high, np.concatenate([low[:1], high])]
    pool.share(low[:1])
    for stamp, page in enumerate((*low[:2].tolist(), *high.tolist()), start=1):
        write(pool, page, stamp)
    slab = weakref.ref(pool.slab(1).keys[0])
    assert pool.shrink(tables)
    pool.check_integrity(tables)
    assert (pool.live_slabs, len(pool.slabs)) == (1, 1)
    for table, stamps in zip(tables, ((1, 2), (3,), (1, 3)), strict=True):
        assert all(holds(pool, page, stamp) for page, stamp in zip(table.tolist(), stamps, strict=True))
    assert slab() is None, "the dropped slab's memory is still held"


def test_shrinking_drops_the_emptiest_slab() -> None:
    pool = pool_of(3)
    pages = pool.allocate(12)
    tables = [pages[:3].copy(), pages[4:5].copy(), pages[8:10].copy()]
    for gone in (pages[3:4], pages[5:8], pages[10:]):
        pool.release(gone)
    assert pool.shrink(tables)
    assert pool.slabs[1] is None
    assert tables[0].tolist() == pages[:3].tolist()
    assert tables[2].tolist() == pages[8:10].tolist()
    pool.check_integrity(tables)


def test_shrinking_without_enough_free_pages_changes_nothing() -> None:
    pool = pool_of(2)
    tables = [pool.allocate(5)]
    for stamp, page in enumerate(tables[0].tolist(), start=1):
        write(pool, page, stamp)
    before = tables[0].copy()
    assert not pool.shrink(tables)
    assert tables[0].tolist() == before.tolist()
    assert (pool.live_slabs, pool.free_pages) == (2, 3)
    assert all(holds(pool, page, stamp) for stamp, page in enumerate(before.tolist(), start=1))
    pool.check_integrity(tables)
    pool.release(tables[0][4:])
    tables[0] = tables[0][:4]
    assert pool.shrink(tables), "with as much room as needed it does not refuse"
    assert not pool.shrink(tables)
    pool.check_integrity(tables)


def test_shrinking_that_cannot_copy_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(2)
    low, high = pool.allocate(4), pool.allocate(2)
    pool.release(low[2:])
    tables = [low[:2], high]
    for stamp, page in enumerate((*low[:2].tolist(), *high.tolist()), start=1):
        write(pool, page, stamp)
    before = [table.tolist() for table in tables]

    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(slabs, "_copy", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        pool.shrink(tables)
    assert [table.tolist() for table in tables] == before
    assert (pool.live_slabs, pool.free_pages) == (2, 4)
    pool.check_integrity(tables)
    monkeypatch.undo()
    assert pool.shrink(tables)
    pool.check_integrity(tables)
    pages = np.concatenate(tables).tolist()
    assert all(holds(pool, page, stamp) for stamp, page in enumerate(pages, start=1))


def test_empty_pool_does_not_shrink() -> None:
    pool = pool_of(0)
    assert not pool.shrink([])
    pool.grow()
    assert pool.shrink([])
    assert not pool.shrink([])
    assert pool.slabs == []


def test_next_slab_reuses_a_dropped_index() -> None:
    pool = pool_of(3)
    pages = pool.allocate(12)
    pool.release(pages[4:8])
    tables = [pages[:4], pages[8:]]
    assert pool.shrink(tables)
    with pytest.raises(AssertionError, match="slab 1 was dropped"):
        pool.slab(1)
    pool.grow()
    pool.check_integrity(tables)
    assert sorted(pool.allocate(4).tolist()) == [4, 5, 6, 7]


# -- the check itself ------------------------------------------------------------------------------------


def test_check_integrity_detects_wrong_counts_and_free_lists() -> None:
    pool = pool_of(2)
    table = pool.allocate(3)
    pool.check_integrity([table])
    for wrong in ([], [table[:2]], [table, table[:1]], [np.append(table[:2], 5)]):
        with pytest.raises(AssertionError, match="wrong reference counts"):
            pool.check_integrity(wrong)
    pool._free[1].append(pool._free[1][0])
    with pytest.raises(AssertionError, match="do not make up the slabs"):
        pool.check_integrity([table])
    pool._free[1] = pool._free[1][:2]
    with pytest.raises(AssertionError, match="do not make up the slabs"):
        pool.check_integrity([table])


def test_check_integrity_detects_counts_and_free_lists_of_the_wrong_length() -> None:
    pool = pool_of(2)
    table = pool.allocate(3)
    references = pool._references
    pool._references = references[:-1]
    with pytest.raises(AssertionError, match="2 slabs of 4 pages have 2 free lists and 7 reference counts"):
        pool.check_integrity([table])
    pool._references = references
    pool._free.append([])
    with pytest.raises(AssertionError, match="have 3 free lists and 8 reference counts"):
        pool.check_integrity([table])
