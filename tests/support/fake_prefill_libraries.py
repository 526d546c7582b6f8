"""Attention functions with the signatures that torch and flash-attn document, in plain torch: no GPU is needed.

They follow the documentation of each and nothing of this project: sequences by cumulative lengths, a causal mask and
window aligned to the end of the keys, scaling before the softcap, query heads in groups of one key head.
"""

from __future__ import annotations

from itertools import pairwise

import torch


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: tuple[torch.Tensor, torch.Tensor],
    most: tuple[int, int],
    scale: float | None,
    window: tuple[int, int],
    softcap: float = 0.0,
) -> torch.Tensor:
    """A query sees keys from window[0] before its place among the keys to window[1] after it; -1 is all of them."""
    assert query.dtype == key.dtype == value.dtype in (torch.bfloat16, torch.float16)
    assert all(cumulative.dtype == torch.int32 and cumulative[0] == 0 for cumulative in ends)
    assert [int(cumulative[-1]) for cumulative in ends] == [len(query), len(key)]
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    out = torch.empty_like(query)
    for (start, end), (first, last) in zip(*(pairwise(x.tolist()) for x in ends), strict=True):
        queries, keys = end - start, last - first
        assert 0 < queries <= keys
        assert queries <= most[0]
        assert keys <= most[1]
        q = query[start:end].double()
        k, v = (x[first:last].double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (key, value))
        logits = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        place, at = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
        left, right = window
        hidden = torch.zeros(queries, keys, dtype=torch.bool)
        if left >= 0:
            hidden |= at < place - left
        if right >= 0:
            hidden |= at > place + right
        out[start:end] = torch.einsum("hqk,khd->qhd", logits.masked_fill(hidden, -torch.inf).softmax(-1), v).to(out)
    return out


def varlen_attn_of_torch_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    assert query.shape[1] == key.shape[1] == value.shape[1]
    return _attention(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale, window_size)


def varlen_attn_of_torch_2_13(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert num_splits == 1, "how keys are split would depend on the company"
    assert cu_seq_k is not None
    return _attention(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale, window_size)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    window = (window_size[0], 0 if causal else window_size[1])
    ends = (cu_seqlens_q, cu_seqlens_k)
    return _attention(q, k, v, ends, (max_seqlen_q, max_seqlen_k), softmax_scale, window, softcap)
