"""KV memory of the engine: a page pool whose size follows the headroom and the user's limit."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

import torch

from rollout.engine.tp_sync import SingleProcess
from rollout.headroom.headroom import Headroom, after_reserve
from rollout.models.arrays import IntArray, ceil_div
from rollout.models.device import is_out_of_memory
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.kv_cache.prefix_cache import PrefixCache
from rollout.models.kv_cache.state_pool import StatePool

logger = logging.getLogger(__name__)

_MAX_SLAB_BYTES = 1 << 30
#: The pool grows to about this many slabs, so it follows the headroom in steps of a sixteenth.
_SLABS = 16
#: The least slabs that a pool should have room for.
_FEW_SLABS = 4
#: What is kept between calls may take this many slabs, so that little of it is lost to whole slabs.
_KEPT_SLABS = 4


class IdleMemory:
    """KV memory that no call uses, and which may be taken from those who keep it: none."""

    @property
    def bytes_held(self) -> int:
        return 0

    @property
    def runner_bytes(self) -> int:
        """Device memory that the headroom counts as free, but idle runners hold (`Runner.bytes_kept`)."""
        return 0

    def release(self) -> bool:
        """Free all of it. Return whether there was any."""
        return False


class KVMemory:
    """Grows and shrinks a page pool and its pool of recurrent states within the headroom.

    Pages that only the prefix cache holds count as free. Those that no waiting row needs are evicted before a pool
    grows, except for what is kept for later calls; the others where it cannot grow, or when the headroom shrinks.

    Args:
        layout: bytes per token and per row.
        headroom: free memory of the device.
        device: where the pool's tables live.
        max_kv_bytes: limit on the bytes of both pools together; None: no limit.
        reserve_fraction: share of the device's total memory to leave free.
        expected_tokens, expected_rows: most that the first rows will hold; slabs are no larger than that.
        sync: agrees with the other ranks of a tensor-parallel model, whose pools grow together.
        idle: what open sessions keep, which yields to the rows of this memory; None: nothing.
        kept_bytes: pages of so many bytes stay in ``cache`` for later calls, with those of finished completions; a
            model with recurrent states has no use for them.
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
        idle: IdleMemory | None = None,
        kept_bytes: float = 0,
    ) -> None:
        self._sync = sync or SingleProcess()
        self._idle = idle or IdleMemory()
        self._headroom = headroom
        self._max_kv_bytes = max_kv_bytes
        self._reserve_fraction = reserve_fraction
        self.headroom_bytes = 0
        self.peak_bytes = 0
        self.read_headroom()
        max_bytes = max(0, self.headroom_bytes + self._idle.bytes_held)
        if max_kv_bytes is not None:
            max_bytes = min(max_bytes, max_kv_bytes)
        slab_bytes = min(max_bytes // _SLABS, _MAX_SLAB_BYTES)
        if 0 < kept_bytes < math.inf:
            slab_bytes = min(slab_bytes, int(kept_bytes) // _KEPT_SLABS)

        def pages_per_slab(expected_bytes: int, page_bytes: int) -> int:
            return max(1, min(slab_bytes, expected_bytes) // page_bytes) if page_bytes else 1

        self.pool = PagePool(
            layout,
            slab_pages=pages_per_slab(expected_tokens * layout.bytes_per_token, layout.bytes_per_page),
            device=device,
            slab_states=pages_per_slab(expected_rows * layout.bytes_per_row, layout.bytes_per_row),
        )
        self.cache = PrefixCache(self.pool)
        """Pages of prompts, and of finished rows if they are kept for later calls."""
        self.keeps_rows = kept_bytes > 0 and not layout.states
        self._kept_bytes = kept_bytes

    def read_headroom(self, kept_bytes: int = 0) -> None:
        """Read the memory that may still be taken after the reserve; negative if other processes took too much.

        The headroom counts ``kept_bytes`` as free, but a runner holds them (`Runner.bytes_kept`). Of a reserve that is
        not free, idle memory is freed first.
        """
        self._runner_bytes = kept_bytes
        self.headroom_bytes = self._unheld_bytes()
        if self.headroom_bytes < 0:
            self.release_idle()

    def release_idle(self) -> bool:
        """Free what open sessions keep beside this memory. Return whether there was any."""
        if not self._idle.release():
            return False
        self.headroom_bytes = self._unheld_bytes()
        return True

    def _unheld_bytes(self) -> int:
        held = self._runner_bytes + self._idle.runner_bytes
        return after_reserve(self._headroom, self._reserve_fraction) - held

    def begin_call(self, kept_bytes: int = 0) -> None:
        """Read the headroom anew, as `read_headroom` does, and count the peak from here."""
        self.read_headroom(kept_bytes)
        self.peak_bytes = self.bytes_held

    # -- amounts -----------------------------------------------------------------------------

    @property
    def bytes_held(self) -> int:
        return self.pool.bytes_held + self.pool.states.bytes_held

    @property
    def bytes_used(self) -> int:
        """Bytes of the pages and states that rows use."""
        return self.used_pages * self.pool.page_bytes + self.pool.states.used_pages * self.pool.states.page_bytes

    @property
    def used_pages(self) -> int:
        """KV pages that rows use."""
        return self.pool.used_pages - self.cache.evictable_pages

    @property
    def obtainable_bytes(self) -> int:
        """Bytes of free pages and states, and of slabs that may be added, for which idle memory makes way."""
        slab_bytes = max(self.pool.slab_bytes, self.pool.states.slab_bytes)
        return self._free_bytes + self._growable_bytes(self._idle.bytes_held) // slab_bytes * slab_bytes

    @property
    def attainable_pages(self) -> int:
        """KV pages that rows use, that are free, and of slabs that may be added if no new row needs a state."""
        return self.pool.used_pages + self.pool.free_pages + self._growable_slabs() * self.pool.slab_pages

    @property
    def is_coarse(self) -> bool:
        """Whether the pool has room for few slabs, since they were made when there was more memory."""
        return self.pool.slab_pages > 1 and self._growable_bytes() < _FEW_SLABS * self.pool.slab_bytes

    @property
    def excess_bytes(self) -> int:
        """Bytes to free so that the reserve is free again."""
        return min(self.bytes_held, max(0, -self.headroom_bytes))

    @property
    def must_evict(self) -> bool:
        """Whether `excess_bytes` exceeds the free pages, so that rows must be preempted."""
        excess = self.excess_bytes
        return excess > 0 and excess > self._free_bytes

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
    def _free_bytes(self) -> int:
        """Bytes of free pages and states, evictable pages included."""
        pages, states = self.pool, self.pool.states
        free_pages = pages.free_pages + self.cache.evictable_pages
        return free_pages * pages.page_bytes + states.free_pages * states.page_bytes

    def _growable_bytes(self, freed_idle: int = 0) -> int:
        """Return by how many bytes the pools may grow once so much idle memory has been freed."""
        room = self.headroom_bytes
        if self._max_kv_bytes is not None:
            room = min(room, self._max_kv_bytes - self.bytes_held - self._idle.bytes_held)
        return max(0, room + freed_idle)

    def _growable_slabs(self, states: int = 0) -> int:
        """Return the slabs of KV pages that may be added besides those that ``states`` states need."""
        room = self._growable_bytes() - _missing_slabs(self.pool.states, states) * self.pool.states.slab_bytes
        return room // self.pool.slab_bytes if self.pool.page_bytes else min(0, room)

    # -- growing and shrinking -------------------------------------------------------------------------

    def reserve(self, pages: int, states: int = 0, keep_free: int = 0) -> bool:
        """Grow the pools until the pages and states are free. Return False if memory does not allow it.

        Cached pages that no waiting row needs are evicted first, and others where the pool cannot grow. ``keep_free``
        further pages must be obtainable, but the pool neither grows nor evicts for them yet.
        """
        page_pool, state_pool = self.pool, self.pool.states
        keep_free = keep_free if page_pool.page_bytes else 0
        self._evict_unneeded(pages - page_pool.free_pages)
        while True:
            slabs = self._growable_slabs(states)
            missing = pages - page_pool.free_pages - slabs * page_pool.slab_pages
            # Evictable pages take long to count, and there mostly are enough without them.
            if slabs < 0 or (missing + keep_free > 0 and missing + keep_free > self.cache.evictable_pages):
                if not self.release_idle():
                    return False
                continue
            self.cache.evict(missing)
            if self._grow(page_pool, _missing_slabs(page_pool, pages)):
                return self._grow(state_pool, _missing_slabs(state_pool, states))
            if not self.cache.evictable_pages:
                return False

    def _evict_unneeded(self, pages: int) -> None:
        """Free pages that no waiting row needs and that are not kept for later calls, at most so many."""
        if pages > 0 and (evictable := self.cache.evictable_pages):
            kept = self._kept_bytes / self.pool.page_bytes
            if evictable > kept:
                self.cache.evict(min(pages, evictable - int(kept)), needed=False)

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

        Evicts cached pages if no slab can be emptied otherwise. Returns False, with nothing else changed, if that does
        not help.
        """
        self.cache.evict(self.pool.slab_pages - self.pool.free_pages)
        pools = zip(self._pools, (held_pages, held_states), strict=True)
        return any(
            self._shrink(pool, held)
            for pool, held in sorted(pools, key=lambda pair: -pair[0].free_pages * pair[0].page_bytes)
        )

    def free(
        self,
        excess_bytes: int,
        held_pages: Callable[[], Iterable[IntArray]],
        held_states: Callable[[], Iterable[IntArray]],
        preempt: Callable[[], bool],
    ) -> None:
        """Free at least ``excess_bytes``, preempting only when pages cannot be moved into other slabs.

        Args:
            held_pages, held_states: return all page ids in use, as `shrink` takes them.
            preempt: ends the hold of a row on its pages; returns False if there is none.
        """
        before = self.bytes_held
        while self.bytes_held > before - excess_bytes:
            if not self.shrink(held_pages(), held_states()) and not preempt():
                break
        if self.bytes_held < before:
            self.release_cached()

    def shrink_free(self, held_pages: Iterable[IntArray], held_states: Iterable[IntArray]) -> bool:
        """Free as many slabs as the free pages make up. Return whether any slab was freed."""
        before = self.bytes_held
        for pool, held in zip(self._pools, (list(held_pages), list(held_states)), strict=True):
            while pool.free_pages >= pool.slab_pages and self._shrink(pool, held):
                pass
        return self.bytes_held < before

    def shrink_to(self, most_bytes: float) -> None:
        """Free slabs and cached pages until no more bytes are held; no row may live."""
        while self.bytes_held > most_bytes and self.shrink([self.cache.pages], []):
            pass

    def release_cached(self) -> None:
        """Return freed slabs to the driver; torch's allocator would cache them for this process."""
        if self.pool.device.type == "cuda":
            torch.cuda.empty_cache()

    def _shrink(self, pool: PagePool | StatePool, held: Iterable[IntArray]) -> bool:
        try:
            shrunk = pool.shrink(held)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not self._sync.alone:
                raise
            logger.warning("Could not move pages of KV cache for lack of memory; freeing it in other ways.")
            return False
        if shrunk:
            self.headroom_bytes += pool.slab_bytes
        return shrunk


def _missing_slabs(pool: PagePool | StatePool, pages: int) -> int:
    """Return the slabs to add so that ``pages`` are free."""
    return ceil_div(max(0, pages - pool.free_pages), pool.slab_pages)
