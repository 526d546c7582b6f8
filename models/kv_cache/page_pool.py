"""KV memory: pages that hold the keys and values of a few tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Self

import torch

from rollout.models.arrays import IntArray
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.pool import Pool
from rollout.models.kv_cache.slab_index import SlabShare, gather, scatter, split_by_slab
from rollout.models.kv_cache.state_pool import StatePool


@dataclass(frozen=True, slots=True)
class Slab:
    """One allocation a device: for each site, keys ``[pages, page_size, kv_heads, key_dim]`` and values likewise."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    device_slabs: tuple[Slab, ...] = ()
    """The same, device by device, where there are several."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*self.keys, *self.values)


class PagePool(Pool[Slab]):
    """Owner of all KV memory of an engine, and, in ``states``, of what rows keep besides.

    Where sites lie on several devices, so does every page: the keys and values of each site are on its own.

    Args:
        layout: what one token and one row store.
        slab_pages: pages a slab.
        device: where slabs are allocated, but for sites that name another.
        slab_states: rows a slab of ``states``.
    """

    def __init__(self, layout: KVLayout, slab_pages: int, device: torch.device, slab_states: int = 1) -> None:
        super().__init__(layout.bytes_per_page, slab_pages, device)
        self.layout = layout
        self.states = StatePool(layout.states, slab_states, device)
        places = list(layout.shares(device))
        self._device_pools: tuple[PagePool, ...] = ()
        self.layer_locations = tuple((0, index) for index in range(len(layout.layers)))
        """For each site, which of `parts` it is in, and its index there."""
        if any(place != device for place in places):
            on = [places.index(site.device or device) for site in layout.layers]
            self.layer_locations = tuple((part, on[:index].count(part)) for index, part in enumerate(on))
            self._device_pools = tuple(
                PagePool(
                    replace(
                        layout, layers=tuple(s for s, at in zip(layout.layers, on, strict=True) if at == n), states=()
                    ),
                    slab_pages,
                    place,
                )
                for n, place in enumerate(places)
            )

    @property
    def device_pools(self) -> tuple[PagePool, ...]:
        """The pool as one that has all sites of a device, for each device; where there is one, the pool itself.

        Pages and slabs have the same numbers in all. Parts are for those who read and write pages; the whole is owner.
        """
        return self._device_pools or (self,)

    def grow(self, agree: Callable[[bool], bool] = bool) -> bool:
        """See `Pool.grow`."""
        grown = super().grow(agree)
        self._sync_device_pools()
        return grown

    def shrink(self, tables: Iterable[IntArray]) -> bool:
        """See `Pool.shrink`."""
        shrunk = super().shrink(tables)
        self._sync_device_pools()
        return shrunk

    def _sync_device_pools(self) -> None:
        for number, part in enumerate(self._device_pools):
            part.slabs[:] = [None if slab is None else slab.device_slabs[number] for slab in self.slabs]

    def _allocate_slab(self) -> Slab:
        """Zero-filled: a masked key weighs 0, and 0 times an uninitialised NaN is NaN."""
        if self._device_pools:
            slabs = tuple(part._allocate_slab() for part in self._device_pools)
            return Slab(
                tuple(slabs[part].keys[index] for part, index in self.layer_locations),
                tuple(slabs[part].values[index] for part, index in self.layer_locations),
                slabs,
            )
        layout = self.layout
        shape = (self.slab_pages, layout.page_size)
        elements = self.slab_bytes // layout.dtype.itemsize
        memory = torch.empty(elements, dtype=layout.dtype, device=self.device).zero_()
        parts = memory.split(
            [
                self.slab_pages * layout.page_size * site.kv_heads * dim
                for site in layout.layers
                for dim in (site.key_dim, site.value_dim)
            ]
        )
        keys = tuple(parts[2 * i].view(*shape, s.kv_heads, s.key_dim) for i, s in enumerate(layout.layers))
        values = tuple(parts[2 * i + 1].view(*shape, s.kv_heads, s.value_dim) for i, s in enumerate(layout.layers))
        return Slab(keys, values)


@dataclass(frozen=True, slots=True)
class Slots:
    """Token slots of a pool: ``page * page_size + place in page``, in any order, also repeated."""

    pool: PagePool
    count: int
    shares: tuple[SlabShare, ...]

    @classmethod
    def of(cls, pool: PagePool, slots: IntArray) -> Self:
        """The slots [n], at least one."""
        return cls(pool, len(slots), split_by_slab(slots, pool.slab_pages * pool.layout.page_size, pool.device))

    def write(self, site: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes [n, kv_heads, dim] of one site; slots must differ from each other."""
        all_keys, all_values = self._memories(site)
        scatter(self.shares, all_keys, keys)
        scatter(self.shares, all_values, values)

    def read(self, site: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [n, kv_heads, dim] of one site."""
        keys, values = self._memories(site)
        return self._gathered(keys), self._gathered(values)

    def _memories(self, site: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """[slots of a slab, kv_heads, dim] in the slab of each share: keys, and values."""
        slabs = [self.pool.slab(share.slab) for share in self.shares]
        return [slab.keys[site].flatten(0, 1) for slab in slabs], [slab.values[site].flatten(0, 1) for slab in slabs]

    def _gathered(self, memories: list[torch.Tensor]) -> torch.Tensor:
        return gather(self.shares, memories, memories[0].new_empty(self.count, *memories[0].shape[1:]))
