"""Pages that several live rows hold, found in their page tables."""

from __future__ import annotations

import numpy as np

from rollout.batcher.types import IntArray, SharedPages


def find_shared(page_tables: IntArray, pages: IntArray, page_tokens: int) -> SharedPages:
    """Return the pieces of memory that several rows hold.

    Takes time in proportion to the pages of the tables, so callers keep the result until a row comes or leaves: the
    pages that rows add while they decode are their own.

    Args:
        page_tables: [rows, width] page ids, each below a few times the number of pages in memory.
        pages: [rows] leading pages of each table that count: the full pages of the row's prompt.
        page_tokens: tokens per page.
    """
    counted = np.arange(page_tables.shape[1]) < pages[:, None]
    ids, rows = page_tables[counted], np.nonzero(counted)[0]
    holders = np.bincount(ids)
    oldest = np.zeros(len(holders), np.int64)
    # The last write to an entry stays, so the oldest row is written last.
    oldest[ids[::-1]] = rows[::-1]
    shared = holders[ids] > 1
    ids, rows = ids[shared], rows[shared]
    # Rows share beginnings, so the holders of a row's pages only become fewer: their number tells pages apart.
    keys = oldest[ids] * (len(page_tables) + 1) + holders[ids]
    first = np.ones(len(keys), bool)
    first[1:] = (keys[1:] != keys[:-1]) | (rows[1:] != rows[:-1])
    begins = np.flatnonzero(first)
    lengths = np.diff(begins, append=len(keys))
    order = np.argsort(keys[begins], kind="stable")
    piece_keys = keys[begins][order]
    starts = np.flatnonzero(np.append(True, piece_keys[1:] != piece_keys[:-1])[: len(piece_keys)])
    return SharedPages(tokens=lengths[order][starts] * page_tokens, rows=rows[begins][order], starts=starts)
