"""KV pages: what was written stays, whoever grows, shares, shrinks and moves around it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from rollout.models.arrays import IntArray
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.kv_cache.pool import PoolExhausted
from tests.support.kv_pages import CPU, SLAB_PAGES, entries, holds, kv_layout, pool_of, write

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
