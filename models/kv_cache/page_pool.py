"""KV memory: pages that hold the keys and values of ``page_size`` tokens each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch

from rollout.models.arrays import IntArray
from rollout.models.huge_pages import huge_empty
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.pool import Pool
from rollout.models.kv_cache.slab_index import SlabShare, gather, scatter, split_by_slab
from rollout.models.kv_cache.state_pool import StatePool


@dataclass(frozen=True, slots=True)
class Slab:
    """One allocation per device: for each layer, keys [pages, page_size, kv_heads, key_dim], and values likewise."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    device_slabs: tuple[Slab, ...] = ()
    """The same tensors grouped by device; empty if there is one device."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All keys, then all values."""
        return (*self.keys, *self.values)


class LayerLocation(NamedTuple):
    """Where a layer's keys and values are stored."""

    pool: int
    """Index in `PagePool.device_pools`."""
    layer: int
    """Index of the layer in that pool's layout."""


class PagePool(Pool[Slab]):
    """Owner of an engine's KV memory and, in ``states``, of the recurrent states of rows.

    If layers lie on several devices, every page does too: each layer's keys and values are on the layer's device.

    Args:
        layout: what one token and one row store.
        slab_pages: pages per slab.
        device: where slabs are allocated, except for layers that name another device.
        slab_states: rows per slab of ``states``.
    """

    def __init__(self, layout: KVLayout, slab_pages: int, device: torch.device, slab_states: int = 1) -> None:
        super().__init__(layout.bytes_per_page, slab_pages, device)
        self.layout = layout
        self.states = StatePool(layout.states, slab_states, device)
        self._device_pools: tuple[PagePool, ...] = ()
        self.layer_locations = tuple(LayerLocation(pool=0, layer=index) for index in range(len(layout.layers)))
        devices = list(layout.shares(device))
        if any(other != device for other in devices):
            pools = [devices.index(layer.device or device) for layer in layout.layers]
            self.layer_locations = tuple(
                LayerLocation(pool=pool, layer=pools[:index].count(pool)) for index, pool in enumerate(pools)
            )
            self._device_pools = tuple(
                PagePool(self._layout_of(pool), slab_pages, pool_device) for pool, pool_device in enumerate(devices)
            )

    def _layout_of(self, pool: int) -> KVLayout:
        """Return the layout of one device's layers."""
        layers = zip(self.layout.layers, self.layer_locations, strict=True)
        return replace(
            self.layout, layers=tuple(layer for layer, location in layers if location.pool == pool), states=()
        )

    @property
    def device_pools(self) -> tuple[PagePool, ...]:
        """For each device, a pool with the layers of that device; the pool itself if there is only one device.

        All use the same page and slab ids. Read and write pages through them; allocate and release in this pool only.
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

    @property
    def tensor_elements(self) -> list[int]:
        """Elements of the tensors of a slab in their order in memory: each layer's keys, then its values."""
        slots = self.slab_pages * self.layout.page_size
        return [
            slots * layer.kv_heads * dim for layer in self.layout.layers for dim in (layer.key_dim, layer.value_dim)
        ]

    def _sync_device_pools(self) -> None:
        for number, pool in enumerate(self._device_pools):
            pool.slabs[:] = [None if slab is None else slab.device_slabs[number] for slab in self.slabs]
            pool.live_slabs, pool.slab_changes = self.live_slabs, self.slab_changes

    def _allocate_slab(self) -> Slab:
        """Allocate a slab of zeros: a masked key has weight 0, and 0 times an uninitialised NaN is NaN."""
        if self._device_pools:
            slabs = tuple(pool._allocate_slab() for pool in self._device_pools)
            return Slab(
                keys=tuple(slabs[pool].keys[layer] for pool, layer in self.layer_locations),
                values=tuple(slabs[pool].values[layer] for pool, layer in self.layer_locations),
                device_slabs=slabs,
            )
        layout = self.layout
        shape = (self.slab_pages, layout.page_size)
        on_host = self.device.type == "cpu"
        size = self.slab_bytes
        memory = huge_empty(size) if on_host else torch.empty(size, dtype=torch.uint8, device=self.device)
        memory = memory.zero_().view(layout.dtype)
        tensors = memory.split(self.tensor_elements)
        return Slab(
            keys=tuple(
                keys.view(*shape, layer.kv_heads, layer.key_dim)
                for keys, layer in zip(tensors[0::2], layout.layers, strict=True)
            ),
            values=tuple(
                values.view(*shape, layer.kv_heads, layer.value_dim)
                for values, layer in zip(tensors[1::2], layout.layers, strict=True)
            ),
        )


@dataclass(frozen=True, slots=True)
class Slots:
    """Token slots of a pool, ``page * page_size + offset in page``: split by slab once, then used for every layer."""

    pool: PagePool
    count: int
    shares: tuple[SlabShare, ...]

    @classmethod
    def of(cls, pool: PagePool, slots: IntArray) -> Self:
        """Select slots [n], at least one, in any order; reads may repeat slots."""
        return cls(pool, len(slots), split_by_slab(slots, pool.slab_pages * pool.layout.page_size, pool.device))

    def write(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write keys and values [n, kv_heads, dim] of layer ``index``; slots must be unique."""
        key_memories, value_memories = self._memories(index)
        scatter(self.shares, key_memories, keys)
        scatter(self.shares, value_memories, values)

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [n, kv_heads, dim] of layer ``index``."""
        key_memories, value_memories = self._memories(index)
        return self._gathered(key_memories), self._gathered(value_memories)

    def _memories(self, index: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the keys and values [slots per slab, kv_heads, dim] of each share's slab."""
        slabs = [self.pool.slab(share.slab) for share in self.shares]
        return [slab.keys[index].flatten(0, 1) for slab in slabs], [slab.values[index].flatten(0, 1) for slab in slabs]

    def _gathered(self, memories: list[torch.Tensor]) -> torch.Tensor:
        return gather(self.shares, memories, memories[0].new_empty(self.count, *memories[0].shape[1:]))
