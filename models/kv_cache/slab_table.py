"""Device-side table of slab addresses, at a fixed address of its own while slabs are added and dropped."""

from __future__ import annotations

import numpy as np
import torch

from rollout.models.arrays import IntArray, upload
from rollout.models.kv_cache.page_pool import PagePool

#: Bytes; kernels rely on it for 16-byte loads.
ALIGNMENT = 16
#: Far more slabs than a pool on the largest device has; 512 KiB of addresses.
CAPACITY = 1 << 16


class SlabTable:
    """Base addresses of a pool's slabs, refreshed in place so that CUDA graphs stay valid when slabs change.

    Args:
        pool: owner of the slabs.
        capacity: largest number of slabs.
    """

    def __init__(self, pool: PagePool, capacity: int = CAPACITY) -> None:
        self.pool = pool
        self.addresses = torch.zeros(capacity, dtype=torch.int64, device=pool.device)
        """[capacity] int64, 0 where there is no slab."""
        self.live = np.zeros(0, np.bool_)
        """[slabs] True where the pool has a slab."""
        self._known_changes = 0
        """`Pool.slab_changes` at the last refresh."""
        starts: IntArray = np.cumsum([0, *pool.tensor_elements], dtype=np.int64)
        self.keys_at: list[int] = starts[:-1:2].tolist()
        """Elements from a slab's address to the keys of each layer."""
        self.values_at: list[int] = starts[1::2].tolist()
        """Elements from a slab's address to the values of each layer."""

    def refresh(self) -> None:
        """Update the table if slabs were added or dropped, in the order of the device's current stream.

        Raises:
            ValueError: the pool has more slabs than the table holds, or a slab is not aligned.
        """
        if self.pool.slab_changes == self._known_changes:
            return
        addresses = tuple(0 if slab is None else slab.keys[0].data_ptr() for slab in self.pool.slabs)
        if len(addresses) > len(self.addresses):
            raise ValueError(
                f"The pool has {len(addresses)} slabs, but the table of their addresses holds {len(self.addresses)}: "
                "use larger slabs."
            )
        if any(address % ALIGNMENT for address in addresses):
            raise ValueError(f"A slab of the pool is not aligned to {ALIGNMENT} bytes.")
        # Entries of dropped slabs beyond the new end are zeroed too.
        upload(np.array(addresses + (0,) * (len(self.live) - len(addresses)), np.int64), self.addresses)
        self.live = np.array(addresses, np.int64) != 0
        self._known_changes = self.pool.slab_changes
