"""KV memory: pages that hold the keys and values of a few tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rollout.models.layout import KVLayout
from rollout.models.slabs import Pool
from rollout.models.states import StatePool


@dataclass(frozen=True, slots=True)
class Slab:
    """One allocation: for each site, keys ``[pages, page_size, kv_heads, key_dim]`` and values likewise."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*self.keys, *self.values)


class PagePool(Pool[Slab]):
    """Owner of all KV memory of an engine, and, in ``states``, of what rows keep besides.

    Args:
        layout: what one token and one row store.
        slab_pages: pages a slab.
        device: where slabs are allocated.
        slab_states: rows a slab of ``states``.
    """

    def __init__(self, layout: KVLayout, slab_pages: int, device: torch.device, slab_states: int = 1) -> None:
        super().__init__(layout.bytes_per_page, slab_pages, device)
        self.layout = layout
        self.states = StatePool(layout.states, slab_states, device)

    def _allocate_slab(self) -> Slab:
        """Zero-filled: a masked key weighs 0, and 0 times an uninitialised NaN is NaN."""
        layout = self.layout
        shape = (self.slab_pages, layout.page_size)
        elements = self.slab_bytes // layout.dtype.itemsize
        memory = torch.empty(elements, dtype=layout.dtype, device=self.device).zero_()
        parts = memory.split(
            [
                self.slab_pages * layout.page_size * site.kv_heads * dim
                for site in layout.sites
                for dim in (site.key_dim, site.value_dim)
            ]
        )
        keys = tuple(parts[2 * i].view(*shape, s.kv_heads, s.key_dim) for i, s in enumerate(layout.sites))
        values = tuple(parts[2 * i + 1].view(*shape, s.kv_heads, s.value_dim) for i, s in enumerate(layout.sites))
        return Slab(keys, values)
