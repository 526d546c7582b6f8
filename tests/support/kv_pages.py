"""A pool of small pages, and what tests write to them and find there."""

from __future__ import annotations

import torch
from torch import nn

from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool

SLAB_PAGES, PAGE_SIZE = 4, 2
CPU = torch.device("cpu")


def kv_layout(dtype: torch.dtype = torch.float32) -> KVLayout:
    """Two layers that differ in heads and in key and value width."""
    layers = (
        AttentionLayer(nn.Identity(), 2, 3, 5, MaskKind()),
        AttentionLayer(nn.Identity(), 1, 4, 2, MaskKind("window", 8)),
    )
    return KVLayout(layers, dtype, PAGE_SIZE)


def pool_of(slabs: int) -> PagePool:
    pool = PagePool(kv_layout(), SLAB_PAGES, CPU)
    for _ in range(slabs):
        pool.grow()
    return pool


def pattern(tensor: torch.Tensor, stamp: int, which: int) -> torch.Tensor:
    """What a page with this stamp holds in the ``which``-th tensor: every entry of every tensor differs."""
    return (1000 * stamp + 100 * which + torch.arange(tensor[0].numel())).view(tensor[0].shape).to(tensor.dtype)


def write(pool: PagePool, page: int, stamp: int) -> None:
    slab = pool.slab(page // SLAB_PAGES)
    for which, tensor in enumerate((*slab.keys, *slab.values)):
        tensor[page % SLAB_PAGES] = pattern(tensor, stamp, which)


def holds(pool: PagePool, page: int, stamp: int) -> bool:
    slab = pool.slab(page // SLAB_PAGES)
    tensors = (*slab.keys, *slab.values)
    return all(torch.equal(t[page % SLAB_PAGES], pattern(t, stamp, which)) for which, t in enumerate(tensors))


def entries(pool: PagePool, page: int) -> torch.Tensor:
    slab = pool.slab(page // SLAB_PAGES)
    return torch.cat([tensor[page % SLAB_PAGES].flatten() for tensor in (*slab.keys, *slab.values)])
