"""How much KV memory the engine may hold now: the pool's size follows the headroom and the user's cap."""

from __future__ import annotations

import logging

import torch

from rollout.headroom import Headroom, after_reserve
from rollout.models.layout import KVLayout
from rollout.models.pages import PagePool

logger = logging.getLogger(__name__)

_MOST_SLAB_BYTES = 1 << 30
#: The pool at its largest is about so many slabs: a slab is the step by which it follows headroom.
_SLABS = 16


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused; torch's CPU allocator says it in a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class Memory:
    """Grows and shrinks a page pool within headroom.

    Args:
        layout: what one token stores.
        headroom: telemetry of the device.
        max_kv_bytes: never more KV bytes than this; None is no cap.
        reserve_fraction: share of the device's total memory that is always left free.
        demand_tokens: tokens that the first rows will hold at most; slabs are no larger than they ask for.
    """

    def __init__(
        self,
        layout: KVLayout,
        headroom: Headroom,
        device: torch.device,
        max_kv_bytes: int | None,
        reserve_fraction: float,
        demand_tokens: int,
    ) -> None:
        self._headroom = headroom
        self._max_kv_bytes = max_kv_bytes
        self._reserve_fraction = reserve_fraction
        self.headroom_bytes = 0
        self.read()
        most = max(0, self.headroom_bytes) if max_kv_bytes is None else min(max(0, self.headroom_bytes), max_kv_bytes)
        slab_bytes = min(most // _SLABS, _MOST_SLAB_BYTES, demand_tokens * layout.bytes_per_token)
        self.pool = PagePool(layout, max(1, slab_bytes // layout.bytes_per_page), device)

    def read(self) -> None:
        """Reads telemetry: what may still be taken after the reserve; negative when others took too much."""
        self.headroom_bytes = after_reserve(self._headroom, self._reserve_fraction)

    @property
    def growable_slabs(self) -> int:
        """Slabs that the pool may add now."""
        room = self.headroom_bytes
        if self._max_kv_bytes is not None:
            room = min(room, self._max_kv_bytes - self.pool.bytes_held)
        return max(0, room // self.pool.slab_bytes)

    @property
    def obtainable_pages(self) -> int:
        """Pages that are free or may be grown."""
        return self.pool.free_pages + self.growable_slabs * self.pool.slab_pages

    def could_hold(self, pages: int) -> bool:
        """Whether ``pages`` would fit if nobody but this process used the device."""
        room = int((1 - self._reserve_fraction) * self._headroom.total_bytes)
        if self._max_kv_bytes is not None:
            room = min(room, self._max_kv_bytes)
        return pages <= room // self.pool.slab_bytes * self.pool.slab_pages

    def reserve(self, pages: int, leaving: int = 0) -> bool:
        """Sees to it that ``pages`` are free, growing as allowed; False when they cannot be.

        ``leaving`` more must be obtainable besides, but the pool does not grow for them yet.
        """
        if self.obtainable_pages < pages + leaving:
            return False
        while self.pool.free_pages < pages:
            if not self.growable_slabs:
                return False
            try:
                self.pool.grow()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("The allocator refused a slab of %d bytes; going on without.", self.pool.slab_bytes)
                self.headroom_bytes = 0  # until the next reading
                return False
            self.headroom_bytes -= self.pool.slab_bytes
        return True

    @property
    def excess_slabs(self) -> int:
        """Slabs to give back for headroom to be what was reserved."""
        return min(self.pool.live_slabs, -(min(0, self.headroom_bytes) // self.pool.slab_bytes))
