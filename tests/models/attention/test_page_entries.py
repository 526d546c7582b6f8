"""Page table entries for the Triton kernels, written anew or only where they change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout.models.attention.page_entries import PageEntries
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.kv_cache.slab_table import SlabTable

_CPU = torch.device("cpu")


def slab_table(slabs: int, slab_pages: int = 8) -> SlabTable:
    layout = KVLayout((AttentionLayer(None, 1, 8, 8, MaskKind()),), torch.float32, 4)
    pool = PagePool(layout, slab_pages, _CPU)
    for _ in range(slabs):
        pool.grow()
    table = SlabTable(pool)
    table.refresh()
    return table


@pytest.mark.parametrize("seed", range(6))
def test_each_row_has_its_pages_after_any_sequence_of_steps(seed: int) -> None:
    print("seed", seed)
    rng = np.random.default_rng(seed)
    slabs = slab_table(60)
    made, entries = PageEntries(slabs), np.zeros(400, np.int32)
    tables, counts = rng.integers(0, 480, (6, 40)), rng.integers(1, 30, 6)
    partly = 0
    for _ in range(60):
        event = rng.random()
        if event < 0.6:  # a row grows, into a page that its table may have named before
            row = rng.integers(len(counts))
            counts[row] = min(counts[row] + 1, 38)
            tables[row, counts[row] - rng.integers(0, 2)] = rng.integers(480)
        elif event < 0.75:  # a row leaves, another comes
            leaving = rng.integers(len(counts))
            tables = np.concatenate([np.delete(tables, leaving, 0), rng.integers(0, 480, (1, 40))])
            counts = np.append(np.delete(counts, leaving), rng.integers(1, 30))
        elif event < 0.85:  # pages move
            tables[rng.integers(len(counts)), rng.integers(30)] = rng.integers(480)
        given = tables[:, : counts.max()].copy()
        if event > 0.92:  # garbage behind the end of a row
            given[0, counts[0] :] = 10**9
        before = entries.copy()
        changed = made.fill(entries, given, counts.copy())
        assert changed or (before == entries).all()
        partly += 0 < (before != entries).sum() < 20
        for row, count in enumerate(counts):
            start = made.starts[row]
            assert (entries[start : start + count] == tables[row, :count]).all()
        assert ((entries[: made.used] >= 0) & (entries[: made.used] < 480)).all()
    assert partly


def test_rows_of_very_different_lengths_need_no_more_entries_than_they_have_pages() -> None:
    made, entries = PageEntries(slab_table(20)), np.zeros(48, np.int32)
    tables = np.arange(160).reshape(4, 40)
    made.fill(entries, tables, np.array([2, 40, 1, 5]))
    assert made.used == 48
    assert entries.tolist() == [0, 1, *range(40, 80), 80, *range(120, 125)]


def test_pages_in_no_slab_are_refused_also_when_little_else_changes() -> None:
    slabs = slab_table(20)
    made, entries = PageEntries(slabs), np.zeros(160, np.int32)
    tables, counts = np.arange(80).reshape(4, 20), np.array([16, 12, 3, 7])
    made.fill(entries, tables, counts)
    assert not made.fill(entries, tables.copy(), counts)
    for page in (-1, 160):
        wrong = tables.copy()
        wrong[1, 4] = page
        with pytest.raises(IndexError, match="in no slab"):
            made.fill(entries, wrong, counts)
    slabs.pool.slabs[2] = None  # pages 16 to 23
    slabs.pool.slab_changes += 1  # as where a pool drops one
    slabs.refresh()
    with pytest.raises(IndexError, match="in no slab"):
        made.fill(entries, tables, np.array([16, 4, 3, 7]))
    made.fill(entries, tables, np.array([16, 0, 3, 7]))
    assert (entries[:16] == tables[0, :16]).all()
