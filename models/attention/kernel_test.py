"""What every kernel must pass on a machine before it is used there: small prefills and a decode as plain attention."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from rollout.models.attention.interface import ScoreParams
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool

#: Errors up to this are rounding.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, ScoreParams], torch.Tensor]
"""As `rollout.models.attention.base.PagedAttention.compute`."""

_LENGTH, _BREAK, _PAGE_SIZE, _KV_HEADS, _GROUP = 75, 49, 4, 2, 3
_FULL = MaskKind()


def largest_error(
    attention: Callable[[PagePool, ForwardBatch], Attention],
    dtype: torch.dtype,
    dims: tuple[tuple[int, int], ...],
    device: torch.device,
    span: MaskKind = _FULL,
) -> float:
    """The largest difference to plain attention; infinite if there is none.

    Args:
        attention: attends in one forward.
        dims: sizes of a key and a value, each pair for a site.
        span: of all sites.
    """
    sites = tuple(AttentionLayer(None, _KV_HEADS, key_dim, value_dim, span) for key_dim, value_dim in dims)
    pool = PagePool(KVLayout(sites, dtype, _PAGE_SIZE), 10, device)
    pool.grow()
    pool.grow()
    tables = np.arange(-(-_LENGTH // _PAGE_SIZE))[::-1].copy()[None]
    # A prefill, one that goes on, and a decode.
    parts = [slice(0, _BREAK), slice(_BREAK, _LENGTH - 1), slice(_LENGTH - 1, _LENGTH)]
    steps = [
        attention(
            pool,
            ForwardBatch(
                torch.zeros(count, dtype=torch.int64, device=device), tables, np.array([start]), np.array([count])
            ),
        )
        for start, count in ((part.start, part.stop - part.start) for part in parts)
    ]
    error = 0.0
    for index, (key_dim, value_dim) in enumerate(dims):
        # No random numbers: the process's generators stay as they are.
        query, key, value = (
            torch.arange(_LENGTH * heads * dim).mul(step).sin().mul(2).view(_LENGTH, heads, dim).to(device, dtype)
            for heads, dim, step in (
                (_KV_HEADS * _GROUP, key_dim, 0.37),
                (_KV_HEADS, key_dim, 0.61),
                (_KV_HEADS, value_dim, 0.83),
            )
        )
        scale = key_dim**-0.5
        outputs = [
            step(index, query[part], key[part], value[part], ScoreParams(scale))
            for step, part in zip(steps, parts, strict=True)
        ]
        difference = float((torch.cat(outputs).cpu().double() - _plain(query, key, value, scale, span)).abs().max())
        error = max(error, difference if difference == difference else float("inf"))
    return error


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, span: MaskKind) -> torch.Tensor:
    """Causal attention of the definition, in double precision and on the CPU."""
    query, key, value = (x.cpu().double() for x in (query, key, value))
    logits = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(_GROUP, 1)) * scale
    positions = np.arange(len(query))
    hidden = torch.from_numpy((positions > positions[:, None]) | (positions < span.first_keys(positions)[:, None]))
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(_GROUP, 1))
