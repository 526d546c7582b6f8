"""Pages that rows share, found in page tables, against a count page by page."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from rollout.batcher.shared_pages import find_shared
from rollout.batcher.types import SharedPages


def tables(*rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows), default=0)
    return np.array([row + [0] * (width - len(row)) for row in rows], np.int64).reshape(len(rows), width), np.array(
        [len(row) for row in rows], np.int64
    )


def pieces(shared: SharedPages) -> dict[tuple[int, ...], int]:
    ends = [*shared.starts.tolist()[1:], len(shared.rows)]
    holders = [tuple(shared.rows[start:end].tolist()) for start, end in zip(shared.starts.tolist(), ends, strict=True)]
    assert len(set(holders)) == len(shared)
    return dict(zip(holders, shared.tokens.tolist(), strict=True))


def test_rows_that_begin_alike_share_pieces():
    found = find_shared(*tables([5, 6, 7, 8], [5, 6, 9], [5, 6, 9, 3], [4], [5, 6, 7]), page_tokens=16)
    assert pieces(found) == {(0, 1, 2, 4): 32, (0, 4): 16, (1, 2): 16}
    assert found.holders.tolist() == [len(holders) for holders in pieces(found)]
    assert found.tokens_per_row(5).tolist() == [48, 48, 48, 0, 48]


def test_entries_past_the_counted_pages_are_ignored():
    table, counts = tables([5, 6, 7], [5, 6, 8])
    counts[1] = 1
    assert pieces(find_shared(table, counts, 4)) == {(0, 1): 4}
    assert len(find_shared(table, counts * 0, 4)) == 0


def test_without_rows_nothing_is_shared():
    found = find_shared(*tables(), page_tokens=16)
    assert len(found) == 0
    assert found.tokens_per_row(0).tolist() == []


@pytest.mark.parametrize("seed", range(20))
def test_pieces_equal_a_count_page_by_page(seed: int):
    rng = np.random.default_rng(seed)
    paths: list[list[int]] = [[]]
    fresh = iter(rng.permutation(2000).tolist())
    rows = []
    for _ in range(int(rng.integers(1, 60))):
        path = paths[int(rng.integers(len(paths)))]
        path = path[: int(rng.integers(0, len(path) + 1))]
        rows.append(path + [next(fresh) for _ in range(int(rng.integers(0, 8)))])
        paths.append(rows[-1])
    holders = defaultdict(list)
    for row, path in enumerate(rows):
        for page in path:
            holders[page].append(row)
    expected: dict[tuple[int, ...], int] = defaultdict(int)
    for held_by in holders.values():
        if len(held_by) > 1:
            expected[tuple(held_by)] += 16
    found = find_shared(*tables(*rows), page_tokens=16)
    assert pieces(found) == expected
    per_row = [sum(16 for page in path if len(holders[page]) > 1) for path in rows]
    assert found.tokens_per_row(len(rows)).tolist() == per_row
