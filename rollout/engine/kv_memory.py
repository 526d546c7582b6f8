"""How much KV memory the engine may hold now: the pool's size follows the headroom and the user's cap."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from rollout.engine.tp_sync import SingleProcess
from rollout.headroom.headroom import Headroom, after_reserve
from rollout.models.arrays import IntArray
from rollout.models.device import is_out_of_memory
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.kv_cache.state_pool import StatePool

logger = logging.getLogger(__name__)

_MOST_SLAB_BYTES = 1 << 30
#: The pool at its largest is about so many slabs: a slab is the step by which it follows headroom.
_SLABS = 16


class KVMemory:
    """Grows and shrinks a page pool, and its pool of recurrent states, within headroom.

    Args:
        layout: what one token and one row store.
        headroom: telemetry of the device.
        max_kv_bytes: never more bytes than this in both pools; None is no cap.
        reserve_fraction: share of the device's total memory that is always left free.
        demand_tokens, demand_rows: what the first rows will hold at most; slabs are no larger than they ask for.
        together: whose pools grow together.
    """

    def __init__(
        self,
        layout: KVLayout,
        headroom: Headroom,
        device: torch.device,
        max_kv_bytes: int | None,
        reserve_fraction: float,
        demand_tokens: int,
        demand_rows: int = 1,
        together: SingleProcess | None = None,
    ) -> None:
        self._sync = together or SingleProcess()
        self._headroom = headroom
        self._max_kv_bytes = max_kv_bytes
        self._reserve_fraction = reserve_fraction
        self.headroom_bytes = 0
        self.peak_bytes = 0
        self.read()
        most = max(0, self.headroom_bytes) if max_kv_bytes is None else min(max(0, self.headroom_bytes), max_kv_bytes)
        slab_bytes = min(most // _SLABS, _MOST_SLAB_BYTES)

        def slab_pages(demand_bytes: int, page_bytes: int) -> int:
            return max(1, min(slab_bytes, demand_bytes) // page_bytes) if page_bytes else 1

        self.pool = PagePool(
            layout,
            slab_pages(demand_tokens * layout.bytes_per_token, layout.bytes_per_page),
            device,
            slab_pages(demand_rows * layout.bytes_per_row, layout.bytes_per_row),
        )

    def read(self, kept_bytes: int = 0) -> None:
        """Reads telemetry: what may still be taken after the reserve; negative when others took too much.

        ``kept_bytes`` count as free there and are not: `rollout.models.runners.base.Runner.bytes_kept`.
        """
        self.headroom_bytes = after_reserve(self._headroom, self._reserve_fraction) - kept_bytes

    # -- how much there is -----------------------------------------------------------------------------

    @property
    def bytes_held(self) -> int:
        return self.pool.bytes_held + self.pool.states.bytes_held

    @property
    def bytes_used(self) -> int:
        """Bytes of the pages and states that rows hold."""
        return sum(pool.used_pages * pool.page_bytes for pool in self._pools)

    @property
    def obtainable_bytes(self) -> int:
        """Bytes of pages and states that are free, and of slabs that may be added."""
        slab_bytes = max(pool.slab_bytes for pool in self._pools)
        free = sum(pool.free_pages * pool.page_bytes for pool in self._pools)
        return free + self._growable_bytes // slab_bytes * slab_bytes

    @property
    def obtainable_pages(self) -> int:
        """Pages for keys and values that are free or may be grown, if no more rows come."""
        pool = self.pool
        grown = self._growable_bytes // pool.slab_bytes * pool.slab_pages if pool.page_bytes else 0
        return pool.free_pages + grown

    @property
    def excess_bytes(self) -> int:
        """Bytes to give back for headroom to be what was reserved."""
        return min(self.bytes_held, max(0, -self.headroom_bytes))

    @property
    def wants_rows_back(self) -> bool:
        """Whether giving back `excess_bytes` takes more than what is free."""
        return self.excess_bytes > sum(pool.free_pages * pool.page_bytes for pool in self._pools)

    def could_hold(self, pages: int, states: int = 0) -> bool:
        """Whether so much would fit if nobody but this process used the device."""
        room = int((1 - self._reserve_fraction) * self._headroom.total_bytes)
        if self._max_kv_bytes is not None:
            room = min(room, self._max_kv_bytes)
        counts = zip(self._pools, (pages, states), strict=True)
        return sum(-(-count // pool.slab_pages) * pool.slab_bytes for pool, count in counts) <= room

    @property
    def _pools(self) -> tuple[PagePool | StatePool, ...]:
        return self.pool, self.pool.states

    @property
    def _growable_bytes(self) -> int:
        room = self.headroom_bytes
        if self._max_kv_bytes is not None:
            room = min(room, self._max_kv_bytes - self.bytes_held)
        return max(0, room)

    # -- taking and giving back ------------------------------------------------------------------------

    def reserve(self, pages: int, states: int = 0, leaving: int = 0) -> bool:
        """Sees to it that so many pages and states are free, growing as allowed; False when they cannot be.

        ``leaving`` more pages must be obtainable besides, but the pool does not grow for them yet.
        """

        def lacking_slabs(pool: PagePool | StatePool, count: int) -> int:
            return max(0, -((pool.free_pages - count) // pool.slab_pages))

        wanted = ((self.pool, pages, leaving), (self.pool.states, states, 0))
        lacking = sum(lacking_slabs(pool, count + besides) * pool.slab_bytes for pool, count, besides in wanted)
        if lacking > self._growable_bytes:
            return False
        return all(self._grow(pool, lacking_slabs(pool, count)) for pool, count, _ in wanted)

    def _grow(self, pool: PagePool | StatePool, slabs: int) -> bool:
        for _ in range(slabs):
            try:
                grown = pool.grow(self._sync.all)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                grown = False
                logger.warning("The allocator refused a slab of %d bytes; going on without.", pool.slab_bytes)
            if not grown:
                self.headroom_bytes = 0  # until the next reading
                return False
            self.headroom_bytes -= pool.slab_bytes
            self.peak_bytes = max(self.peak_bytes, self.bytes_held)
        return True

    def shrink(self, held_pages: Iterable[IntArray], held_states: Iterable[IntArray]) -> bool:
        """Gives back a slab of the pool that has more to spare; what rows hold is moved and renamed in place.

        Returns False, with nothing changed, when no slab can be emptied.
        """
        pools = zip(self._pools, (held_pages, held_states), strict=True)
        return any(
            self._shrink(pool, held)
            for pool, held in sorted(pools, key=lambda pair: -pair[0].free_pages * pair[0].page_bytes)
        )

    def shrink_free(self, held_pages: Iterable[IntArray], held_states: Iterable[IntArray]) -> bool:
        """Gives back all that is free, as far as it makes up slabs. Returns whether there was any."""
        before = self.bytes_held
        for pool, held in zip(self._pools, (list(held_pages), list(held_states)), strict=True):
            while pool.free_pages >= pool.slab_pages and self._shrink(pool, held):
                pass
        return self.bytes_held < before

    def hand_back(self) -> None:
        """Lets other processes have what was given back: torch keeps it for this one until it is told not to."""
        if self.pool.device.type == "cuda":
            torch.cuda.empty_cache()

    def _shrink(self, pool: PagePool | StatePool, held: Iterable[IntArray]) -> bool:
        shrunk = pool.shrink(held)
        if shrunk:
            self.headroom_bytes += pool.slab_bytes
        return shrunk
