"""KV pages: what was written stays, whoever grows, shares, shrinks and moves around it."""

from __future__ import annotations

import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from rollout.models.arrays import IntArray
from rollout.models.kv_cache import pool as slabs
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.kv_cache.pool import PoolExhausted

SLAB_PAGES, PAGE_SIZE = 4, 2
CPU = torch.device("cpu")


def kv_layout(dtype: torch.dtype = torch.float32) -> KVLayout:
    """Two layers that differ in heads and in key and value width."""
    layers = (
        AttentionLayer(nn.Identity(), 2, 3, 5, MaskKind()),
        AttentionLayer(nn.Identity(), 1, 4, 2, MaskKind("window", 8)),
    )
    return KVLayout(layers, dtype, PAGE_SIZE)


def pool_of(slabs: int) -> PagePool:
    pool = PagePool(kv_layout(), SLAB_PAGES, CPU)
    for _ in range(slabs):
        pool.grow()
    return pool


def pattern(tensor: torch.Tensor, stamp: int, which: int) -> torch.Tensor:
    """What a page with this stamp holds in the ``which``-th tensor: every entry of every tensor differs."""
    return (1000 * stamp + 100 * which + torch.arange(tensor[0].numel())).view(tensor[0].shape).to(tensor.dtype)


def write(pool: PagePool, page: int, stamp: int) -> None:
    slab = pool.slab(page // SLAB_PAGES)
    for which, tensor in enumerate((*slab.keys, *slab.values)):
        tensor[page % SLAB_PAGES] = pattern(tensor, stamp, which)


def holds(pool: PagePool, page: int, stamp: int) -> bool:
    slab = pool.slab(page // SLAB_PAGES)
    tensors = (*slab.keys, *slab.values)
    return all(torch.equal(t[page % SLAB_PAGES], pattern(t, stamp, which)) for which, t in enumerate(tensors))


def entries(pool: PagePool, page: int) -> torch.Tensor:
    slab = pool.slab(page // SLAB_PAGES)
    return torch.cat([tensor[page % SLAB_PAGES].flatten() for tensor in (*slab.keys, *slab.values)])


# -- growing ---------------------------------------------------------------------------------------------


def test_sizes_match_allocated_memory() -> None:
    pool = pool_of(0)
    assert (pool.bytes_held, pool.live_slabs, pool.free_pages, pool.used_pages) == (0, 0, 0, 0)
    pool.grow()
    pool.grow()
    slab = pool.slab(0)
    tensors = (*slab.keys, *slab.values)
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == {slab.keys[0].data_ptr()}
    assert slab.keys[0].untyped_storage().nbytes() == pool.slab_bytes == 4 * 2 * (2 * (3 + 5) + 4 + 2) * 4
    assert [tuple(tensor.shape) for tensor in tensors] == [(4, 2, 2, 3), (4, 2, 1, 4), (4, 2, 2, 5), (4, 2, 1, 2)]
    assert sum(tensor.numel() for tensor in tensors) * 4 == pool.slab_bytes
    assert (pool.bytes_held, pool.live_slabs, pool.free_pages) == (2 * pool.slab_bytes, 2, 8)


def test_half_precision_takes_half_the_bytes() -> None:
    assert PagePool(kv_layout(torch.bfloat16), SLAB_PAGES, CPU).slab_bytes == pool_of(0).slab_bytes // 2


def test_tensors_of_a_slab_do_not_overlap() -> None:
    pool = pool_of(1)
    for page in range(SLAB_PAGES):
        write(pool, page, stamp=page + 1)
    assert all(holds(pool, page, stamp=page + 1) for page in range(SLAB_PAGES))


def test_new_slab_is_zeroed(monkeypatch: pytest.MonkeyPatch) -> None:
    def dirty(*size: int, **options: object) -> torch.Tensor:
        # Floats of which all bits are set are no numbers.
        return torch.full(size, 255, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "empty", dirty)
    pool = pool_of(1)
    assert all(not entries(pool, page).any() for page in range(SLAB_PAGES))


def test_failed_slab_allocation_leaves_pool_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(1)
    table = pool.allocate(2)

    def refuse(*_size: int, **_options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", refuse)
        with pytest.raises(torch.OutOfMemoryError, match="no more"):
            pool.grow()
    pool.check_integrity([table])
    assert (pool.live_slabs, pool.free_pages) == (1, 2)
    pool.grow()
    pool.check_integrity([table])
    assert pool.free_pages == 6


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


# -- all together ----------------------------------------------------------------------------------------


class Model:
    """What the pool should hold: tables, and the stamp that every held page carries."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.pool = pool_of(0)
        self.tables: list[IntArray] = []
        self.stamps: list[list[int]] = []
        self.slabs = self.stamp = 0

    def held(self) -> set[int]:
        return {page for table in self.tables for page in table.tolist()}

    def grow(self) -> None:
        self.pool.grow()
        self.slabs += 1

    def shrink(self) -> None:
        used = [0 if slab is not None else None for slab in self.pool.slabs]
        for page in self.held():
            used[page // SLAB_PAGES] += 1  # type: ignore[operator]
        counts = [count for count in used if count is not None]
        fits = bool(counts) and sum(counts) <= (len(counts) - 1) * SLAB_PAGES
        before = [table.copy() for table in self.tables]
        assert self.pool.shrink(self.tables) == fits
        if fits:
            self.slabs -= 1
        else:
            assert all(np.array_equal(table, old) for table, old in zip(self.tables, before, strict=True))

    def allocate(self) -> None:
        count = self.random.randint(0, 5)
        if count > self.pool.free_pages:
            with pytest.raises(PoolExhausted):
                self.pool.allocate(count)
            return
        table = self.pool.allocate(count)
        stamps = []
        for page in table.tolist():
            self.stamp += 1
            write(self.pool, page, self.stamp)
            stamps.append(self.stamp)
        self.tables.append(table)
        self.stamps.append(stamps)

    def share(self) -> None:
        if self.tables:
            i = self.random.randrange(len(self.tables))
            count = self.random.randint(0, len(self.tables[i]))
            self.pool.share(self.tables[i][:count])
            self.tables.append(self.tables[i][:count].copy())
            self.stamps.append(self.stamps[i][:count])

    def copy(self) -> None:
        if self.tables:
            i = self.random.randrange(len(self.tables))
            if len(self.tables[i]) <= self.pool.free_pages:
                target = self.pool.allocate(len(self.tables[i]))
                self.pool.copy(self.tables[i], target)
                self.tables.append(target)
                self.stamps.append(self.stamps[i])

    def release(self) -> None:
        if self.tables:
            i = self.random.randrange(len(self.tables))
            table, scrub = self.tables.pop(i), self.random.random() < 0.5
            self.stamps.pop(i)
            self.pool.release(table, scrub)
            if scrub:
                assert not any(entries(self.pool, page).any() for page in set(table.tolist()) - self.held())

    def check(self) -> None:
        pool, used = self.pool, len(self.held())
        pool.check_integrity(self.tables)
        assert (pool.live_slabs, pool.used_pages, pool.free_pages) == (self.slabs, used, self.slabs * SLAB_PAGES - used)
        assert pool.bytes_held == self.slabs * pool.slab_bytes
        for table, stamps in zip(self.tables, self.stamps, strict=True):
            assert all(holds(pool, page, stamp) for page, stamp in zip(table.tolist(), stamps, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_random_operations_keep_every_page(seed: int) -> None:
    print("seed", seed)
    model = Model(seed)
    operations = (model.grow, model.shrink, model.allocate, model.allocate, model.share, model.copy, model.release)
    done: dict[str, int] = {}
    for _ in range(120):
        operation = model.random.choice([*operations, model.release])
        if operation == model.grow and model.slabs >= 5:
            operation = model.shrink
        operation()
        done[operation.__name__] = done.get(operation.__name__, 0) + 1
        model.check()
    assert min(done.values()) >= 5
    assert len(done) == 6
