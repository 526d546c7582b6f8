"""Where a pool's slabs lie, in device memory at an address of its own that stays while slabs come and go."""

from __future__ import annotations

import numpy as np
import torch

from rollout.models.arrays import IntArray, upload
from rollout.models.kv_cache.page_pool import PagePool

#: What kernels rely on, for loads of 16 bytes.
ALIGNMENT = 16
#: More slabs than a pool of the largest device should ever have: half a megabyte of addresses.
CAPACITY = 1 << 16


class SlabTable:
    """Base addresses of slabs, followed in place as the pool grows and shrinks: captured launches stay valid.

    Args:
        pool: whose slabs.
        capacity: most slabs.
    """

    def __init__(self, pool: PagePool, capacity: int = CAPACITY) -> None:
        self.pool = pool
        self.addresses = torch.zeros(capacity, dtype=torch.int64, device=pool.device)
        """[capacity], 0 where there is no slab."""
        self.live = np.zeros(0, np.bool_)
        """[slabs]: which are there."""
        self._known: tuple[int, ...] = ()
        sizes = [
            pool.slab_pages * pool.layout.page_size * site.kv_heads * dim
            for site in pool.layout.layers
            for dim in (site.key_dim, site.value_dim)
        ]
        starts: IntArray = np.cumsum([0, *sizes], dtype=np.int64)
        self.keys_at: list[int] = starts[:-1:2].tolist()
        """Of each site: elements from a slab's address to its keys."""
        self.values_at: list[int] = starts[1::2].tolist()

    def follow(self) -> None:
        """Takes notice of slabs that came or went, in the order of the device's current stream.

        Raises:
            ValueError: there are more slabs than the table holds, or one is not aligned as kernels rely on.
        """
        addresses = tuple(0 if slab is None else slab.keys[0].data_ptr() for slab in self.pool.slabs)
        if addresses == self._known:
            return
        if len(addresses) > len(self.addresses):
            raise ValueError(
                f"The pool has {len(addresses)} slabs, but the table of their addresses holds {len(self.addresses)}."
            )
        if any(address % ALIGNMENT for address in addresses):
            raise ValueError(f"A slab of the pool is not aligned to {ALIGNMENT} bytes.")
        # Those that went are forgotten too.
        upload(np.array(addresses + (0,) * (len(self._known) - len(addresses)), np.int64), self.addresses)
        self._known, self.live = addresses, np.array(addresses, np.int64) != 0
