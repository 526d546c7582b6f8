"""KV memory of the engine: a page pool whose size follows the headroom and the user's limit."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from rollout.engine.tp_sync import SingleProcess
from rollout.headroom.headroom import Headroom, after_reserve
from rollout.models.arrays import IntArray, ceil_div
from rollout.models.device import is_out_of_memory
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.kv_cache.state_pool import StatePool

logger = logging.getLogger(__name__)

_MAX_SLAB_BYTES = 1 << 30
#: The pool grows to about this many slabs, so it follows the headroom in steps of a sixteenth.
_SLABS = 16


class KVMemory:
    """Grows and shrinks a page pool and its pool of recurrent states within the headroom.

    Args:
        layout: bytes per token and per row.
        headroom: free memory of the device.
        device: where the pool's tables live.
        max_kv_bytes: limit on the bytes of both pools together; None: no limit.
        reserve_fraction: share of the device's total memory to leave free.
        expected_tokens, expected_rows: most that the first rows will hold; slabs are no larger than that.
        sync: agrees with the other ranks of a tensor-parallel model, whose pools grow together.
    """

    def __init__(
        self,
        layout: KVLayout,
        headroom: Headroom,
        device: torch.device,
        max_kv_bytes: int | None,
        reserve_fraction: float,
        expected_tokens: int,
        expected_rows: int = 1,
        sync: SingleProcess | None = None,
    ) -> None:
        self._sync = sync or SingleProcess()
        self._headroom = headroom
        self._max_kv_bytes = max_kv_bytes
        self._reserve_fraction = reserve_fraction
        self.headroom_bytes = 0
        self.peak_bytes = 0
        self.read_headroom()
        max_bytes = max(0, self.headroom_bytes)
        if max_kv_bytes is not None:
            max_bytes = min(max_bytes, max_kv_bytes)
        slab_bytes = min(max_bytes // _SLABS, _MAX_SLAB_BYTES)

        def pages_per_slab(expected_bytes: int, page_bytes: int) -> int:
            return max(1, min(slab_bytes, expected_bytes) // page_bytes) if page_bytes else 1

        self.pool = PagePool(
            layout,
            slab_pages=pages_per_slab(expected_tokens * layout.bytes_per_token, layout.bytes_per_page),
            device=device,
            slab_states=pages_per_slab(expected_rows * layout.bytes_per_row, layout.bytes_per_row),
        )

    def read_headroom(self, kept_bytes: int = 0) -> None:
        """Read the memory that may still be taken after the reserve; negative if other processes took too much.

        The headroom counts ``kept_bytes`` as free, but a runner holds them (`Runner.bytes_kept`).
        """
        self.headroom_bytes = after_reserve(self._headroom, self._reserve_fraction) - kept_bytes

    # -- amounts -----------------------------------------------------------------------------

    @property
    def bytes_held(self) -> int:
        return self.pool.bytes_held + self.pool.states.bytes_held

    @property
    def bytes_used(self) -> int:
        """Bytes of the pages and states in use."""
        return sum(pool.used_pages * pool.page_bytes for pool in self._pools)

    @property
    def obtainable_bytes(self) -> int:
        """Bytes of free pages and states, and of slabs that may be added."""
        slab_bytes = max(pool.slab_bytes for pool in self._pools)
        free = sum(pool.free_pages * pool.page_bytes for pool in self._pools)
        return free + self._growable_bytes // slab_bytes * slab_bytes

    @property
    def obtainable_pages(self) -> int:
        """Free KV pages, and those of slabs that may be added if no new row needs a state."""
        pool = self.pool
        grown = self._growable_bytes // pool.slab_bytes * pool.slab_pages if pool.page_bytes else 0
        return pool.free_pages + grown

    @property
    def excess_bytes(self) -> int:
        """Bytes to free so that the reserve is free again."""
        return min(self.bytes_held, max(0, -self.headroom_bytes))

    @property
    def must_evict(self) -> bool:
        """Whether `excess_bytes` exceeds the free pages, so that rows must be preempted."""
        return self.excess_bytes > sum(pool.free_pages * pool.page_bytes for pool in self._pools)

    def could_hold(self, pages: int, states: int = 0) -> bool:
        """Return whether the pages and states would fit if no other process used the device."""
        room = int((1 - self._reserve_fraction) * self._headroom.total_bytes)
        if self._max_kv_bytes is not None:
            room = min(room, self._max_kv_bytes)
        counts = zip(self._pools, (pages, states), strict=True)
        return sum(ceil_div(count, pool.slab_pages) * pool.slab_bytes for pool, count in counts) <= room

    @property
    def bound(self) -> str:
        """What bounds the pools if no other process uses the device: ``max_kv_bytes`` with its value, or ``memory``."""
        room = int((1 - self._reserve_fraction) * self._headroom.total_bytes)
        limited = self._max_kv_bytes is not None and self._max_kv_bytes < room
        return f"max_kv_bytes={self._max_kv_bytes:,}" if limited else "memory"

    @property
    def _pools(self) -> tuple[PagePool | StatePool, ...]:
        return self.pool, self.pool.states

    @property
    def _growable_bytes(self) -> int:
        room = self.headroom_bytes
        if self._max_kv_bytes is not None:
            room = min(room, self._max_kv_bytes - self.bytes_held)
        return max(0, room)

    # -- growing and shrinking -------------------------------------------------------------------------

    def reserve(self, pages: int, states: int = 0, keep_free: int = 0) -> bool:
        """Grow the pools until the pages and states are free. Return False if memory does not allow it.

        ``keep_free`` further pages must be obtainable, but the pool does not grow for them yet.
        """
        page_pool, state_pool = self.pool, self.pool.states
        missing_bytes = _missing_slabs(page_pool, pages + keep_free) * page_pool.slab_bytes
        missing_bytes += _missing_slabs(state_pool, states) * state_pool.slab_bytes
        if missing_bytes > self._growable_bytes:
            return False
        return self._grow(page_pool, _missing_slabs(page_pool, pages)) and self._grow(
            state_pool, _missing_slabs(state_pool, states)
        )

    def _grow(self, pool: PagePool | StatePool, slabs: int) -> bool:
        for _ in range(slabs):
            try:
                grown = pool.grow(self._sync.all)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                grown = False
                logger.warning("Could not allocate %d more bytes of KV cache; continuing without.", pool.slab_bytes)
            if not grown:
                self.headroom_bytes = 0  # do not grow again before the next reading
                return False
            self.headroom_bytes -= pool.slab_bytes
            self.peak_bytes = max(self.peak_bytes, self.bytes_held)
        return True

    def shrink(self, held_pages: Iterable[IntArray], held_states: Iterable[IntArray]) -> bool:
        """Free a slab, first of the pool with more free bytes; pages in it move, and their ids change in place.

        Returns False, with nothing changed, if no slab can be emptied.
        """
        pools = zip(self._pools, (held_pages, held_states), strict=True)
        return any(
            self._shrink(pool, held)
            for pool, held in sorted(pools, key=lambda pair: -pair[0].free_pages * pair[0].page_bytes)
        )

    def shrink_free(self, held_pages: Iterable[IntArray], held_states: Iterable[IntArray]) -> bool:
        """Free as many slabs as the free pages make up. Return whether any slab was freed."""
        before = self.bytes_held
        for pool, held in zip(self._pools, (list(held_pages), list(held_states)), strict=True):
            while pool.free_pages >= pool.slab_pages and self._shrink(pool, held):
                pass
        return self.bytes_held < before

    def release_cached(self) -> None:
        """Return freed slabs to the driver; torch's allocator would cache them for this process."""
        if self.pool.device.type == "cuda":
            torch.cuda.empty_cache()

    def _shrink(self, pool: PagePool | StatePool, held: Iterable[IntArray]) -> bool:
        shrunk = pool.shrink(held)
        if shrunk:
            self.headroom_bytes += pool.slab_bytes
        return shrunk


def _missing_slabs(pool: PagePool | StatePool, pages: int) -> int:
    """Return the slabs to add so that ``pages`` are free."""
    return ceil_div(max(0, pages - pool.free_pages), pool.slab_pages)
