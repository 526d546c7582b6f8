"""Page table entries of a forward for the Triton kernels, on the host; only what changes is written anew.

Between two steps that decode, the rows are mostly the same, and one in ``page_size`` of them has a page more. So, if
there is room, every row has as many entries as the longest, and the entries of a row do not move while others grow.
Comparing two page tables takes a tenth of the time of making the entries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rollout.models.arrays import IntArray, ceil_div
from rollout.models.kv_cache.slab_table import SlabTable

Int32Array = NDArray[np.int32]
#: Rows have a multiple of so many entries, so that they are laid out anew once in so many pages.
_ROOM = 16
#: Largest share of the entries that is written one by one.
_FEW = 1 / 16


class PageEntries:
    """Keeps the page table entries of the present forward.

    Args:
        slabs: of the pool that the pages belong to.
    """

    def __init__(self, slabs: SlabTable) -> None:
        self._slabs = slabs
        self._tables: IntArray | None = None
        """[S, pages] what the entries mirror, also behind the ends of rows; None: they do not."""
        self._live: NDArray[np.bool_] | None = None
        self._width = 0
        """Entries per row, if they mirror page tables."""
        self.used = 0
        """Entries, including those that no row uses."""
        self.starts: IntArray = np.zeros(0, np.int64)
        """[S] entry of each row's first page."""

    def fill(self, entries: Int32Array, tables: IntArray, counts: IntArray) -> bool:
        """Write the entries of a forward, in the array that the last forward's stand in; return whether any changed.

        Args:
            entries: [capacity] where they stand; at least as many as all rows have pages.
            tables: [S, pages] page ids; not to be changed afterwards.
            counts: [S] pages of each row.

        Raises:
            IndexError: a page is in no slab.
        """
        rows, pages = tables.shape
        live = self._slabs.live
        if self._tables is not None and self._tables.shape == tables.shape and self._live is live:
            changed = np.flatnonzero(tables != self._tables)
            if not len(changed):
                return False
            if len(changed) <= _FEW * tables.size:
                of, page = np.divmod(changed, pages)
                values = tables[of, page]
                if self._are_live(values):
                    entries[of * self._width + page] = values
                    self._tables = tables
                    return True
        self._tables, self._live = None, live
        width = ceil_div(pages, _ROOM) * _ROOM
        if rows * width <= len(entries):
            own = entries[: rows * width].reshape(rows, width)
            own[:, pages:] = 0
            if self._are_live(tables):
                own[:, :pages] = tables
                self._tables, self._width = tables, width
            else:  # something else stands behind the ends of rows, or the next line raises an error
                used = np.arange(pages) < counts[:, None]
                self._check(tables[used])
                own[:, :pages] = np.where(used, tables, 0)
            self.used, self.starts = rows * width, np.arange(rows) * width
        else:
            values = tables[np.arange(pages) < counts[:, None]]
            self._check(values)
            entries[: len(values)] = values
            self.used = len(values)
            self.starts = np.cumsum(counts) - counts
        return True

    def _are_live(self, pages: IntArray) -> bool:
        """Return whether all pages are in slabs."""
        live, slab_pages = self._slabs.live, self._slabs.pool.slab_pages
        if not pages.size:
            return True
        if pages.min() < 0 or pages.max() >= len(live) * slab_pages:
            return False
        return bool(live.all() or live[pages // slab_pages].all())

    def _check(self, pages: IntArray) -> None:
        """Check that pages are in slabs: a kernel that reads an invalid address breaks the process's CUDA context."""
        if not self._are_live(pages):
            raise IndexError("A sequence of the forward needs a page that is in no slab of the pool.")
