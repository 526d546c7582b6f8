"""Self-test of a backend on this machine: two prefill chunks and a decode, compared with reference attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from rollout.models.arrays import IntArray, ceil_div
from rollout.models.attention.interface import ScoreParams
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool

#: Largest error that is rounding.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, ScoreParams], torch.Tensor]
"""Signature of `rollout.models.attention.base.PagedAttention.compute`."""

_LENGTH = 75
_FIRST_CHUNK = 49
_FULL = MaskKind()


class HeadShape(NamedTuple):
    """The heads of an attention layer, as far as kernels are compiled for them."""

    key_dim: int
    value_dim: int
    kv_heads: int = 2
    group: int = 3
    """Query heads that share a key head."""

    @classmethod
    def of(cls, layer: AttentionLayer) -> HeadShape:
        """Return the heads of a model's layer."""
        return cls(layer.key_dim, layer.value_dim, layer.kv_heads, layer.group)


def largest_error(
    attention: Callable[[PagePool, ForwardBatch], Attention],
    dtype: torch.dtype,
    shapes: Sequence[HeadShape],
    device: torch.device,
    mask_kind: MaskKind = _FULL,
    page_size: int = 4,
) -> float:
    """Return the largest difference from reference attention; infinite if an output is NaN.

    Args:
        attention: creates the attention of one forward.
        dtype: of queries, keys and values.
        shapes: the heads of each layer.
        device: of the pool.
        mask_kind: of all layers.
        page_size: tokens per page.
    """
    layers = tuple(
        AttentionLayer(None, shape.kv_heads, shape.key_dim, shape.value_dim, mask_kind, group=shape.group)
        for shape in shapes
    )
    pages = ceil_div(_LENGTH, page_size)
    pool = PagePool(KVLayout(layers, dtype, page_size), ceil_div(pages, 2), device)
    pool.grow()
    pool.grow()
    page_tables = np.arange(pages)[::-1].copy()[None]
    # A prefill chunk, the chunk that continues it, and a decode.
    chunks = [slice(0, _FIRST_CHUNK), slice(_FIRST_CHUNK, _LENGTH - 1), slice(_LENGTH - 1, _LENGTH)]
    attentions = [attention(pool, _batch(page_tables, chunk, device)) for chunk in chunks]
    error = 0.0
    for index, (key_dim, value_dim, kv_heads, group) in enumerate(shapes):
        # No random numbers, so the process's generators keep their state.
        query, key, value = (
            torch.arange(_LENGTH * heads * dim).mul(step).sin().mul(2).view(_LENGTH, heads, dim).to(device, dtype)
            for heads, dim, step in (
                (kv_heads * group, key_dim, 0.37),
                (kv_heads, key_dim, 0.61),
                (kv_heads, value_dim, 0.83),
            )
        )
        scale = key_dim**-0.5
        outputs = [
            attend(index, query[chunk], key[chunk], value[chunk], ScoreParams(scale))
            for attend, chunk in zip(attentions, chunks, strict=True)
        ]
        expected = _reference(query, key, value, scale=scale, mask_kind=mask_kind)
        difference = float((torch.cat(outputs).cpu().double() - expected).abs().max())
        error = max(error, difference if difference == difference else float("inf"))
    return error


def _batch(page_tables: IntArray, chunk: slice, device: torch.device) -> ForwardBatch:
    count = chunk.stop - chunk.start
    return ForwardBatch(
        tokens=torch.zeros(count, dtype=torch.int64, device=device),
        page_tables=page_tables,
        prefix_lens=np.array([chunk.start]),
        query_lens=np.array([count]),
    )


def _reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask_kind: MaskKind
) -> torch.Tensor:
    """Compute causal attention by its definition, in float64 on the CPU."""
    query, key, value = (x.cpu().double() for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    logits = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, 1)) * scale
    positions = np.arange(len(query))
    masked = (positions > positions[:, None]) | (positions < mask_kind.first_keys(positions)[:, None])
    weights = logits.masked_fill(torch.from_numpy(masked), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(group, 1))
