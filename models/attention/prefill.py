"""Prefill attention by third-party varlen functions.

Such functions read keys and values from one contiguous tensor, but a pool has several slabs. They are therefore used
where contiguous tensors cost little: in a prefill, whose keys and values are the forward's own, or are gathered once
if the prefill continues an earlier chunk. Decoding rows are read in place by the engine's own kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch

from rollout.models.arrays import uploaded
from rollout.models.attention.interface import ScoreParams
from rollout.models.forward_batch import ForwardBatch, countdown, token_slots
from rollout.models.kv_cache.layout import MaskKind
from rollout.models.kv_cache.page_pool import PagePool, Slots


@dataclass(frozen=True, slots=True)
class VarlenMetadata:
    """Boundaries of n sequences in concatenated queries and keys. Queries are the last tokens of each sequence."""

    cu_seqlens_q: torch.Tensor
    """[n + 1] int32 on the device: 0, then the end of each sequence's queries."""
    cu_seqlens_k: torch.Tensor
    """[n + 1] int32 on the device: 0, then the end of each sequence's keys."""
    max_seqlen_q: int
    """Most queries of one sequence; at least 2, since libraries may take another kernel where all have one."""
    max_seqlen_k: int
    """Most keys of one sequence."""


class VarlenFunction(Protocol):
    """Attention over concatenated sequences of different lengths."""

    name: ClassVar[str]
    """One of `rollout.models.attention.names.ATTENTION_BACKENDS`."""

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        metadata: VarlenMetadata,
        mask_kind: MaskKind,
        scores: ScoreParams,
    ) -> torch.Tensor:
        """Attend causally with q [T, heads, dim] to k, v [K, kv_heads, dim]; return [T, heads, dim].

        The output of a sequence must not depend on the batch composition.

        Raises:
            UnsupportedAttention: the function does not support ``scores``.
        """
        ...

    def __hash__(self) -> int: ...


class PrefillAttention:
    """Attention of a forward's prefills. What depends on lengths alone is planned once, for all layers.

    Args:
        pool: holds keys and values.
        batch: the sequences of the forward.
        function: computes the attention.
    """

    def __init__(self, pool: PagePool, batch: ForwardBatch, function: VarlenFunction) -> None:
        self._pool = pool
        self._function = function
        self._tokens: slice | torch.Tensor | None = None
        prefill_lens = batch.query_lens - batch.decodes
        prefills = prefill_lens > 0
        query_lens = prefill_lens[prefills]
        seq_lens = batch.prefix_lens[prefills] + query_lens
        if not len(query_lens):
            return
        tokens = np.repeat(batch.offsets[prefills] + query_lens, query_lens) - countdown(query_lens)
        first, last = int(tokens[0]), int(tokens[-1])
        # The engine puts prefills side by side; tokens that are attended one by one may lie between them.
        contiguous = last - first + 1 == len(tokens)
        self._tokens = slice(first, last + 1) if contiguous else uploaded(tokens, pool.device)
        self._stored: Slots | None = None
        if batch.prefix_lens[prefills].any():
            slots = token_slots(
                page_tables=batch.page_tables[prefills],
                first_positions=np.zeros_like(seq_lens),
                counts=seq_lens,
                page_size=pool.layout.page_size,
            )
            self._stored = Slots.of(pool, slots)
        cu_seqlens_q, cu_seqlens_k = (
            uploaded(np.cumsum([0, *lens]).astype(np.int32), pool.device) for lens in (query_lens, seq_lens)
        )
        self._metadata = VarlenMetadata(
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max(2, int(query_lens.max())),
            max_seqlen_k=int(seq_lens.max()),
        )

    def attend(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: ScoreParams, out: torch.Tensor
    ) -> None:
        """Attend in layer ``index``, whose new keys and values are already in their pages.

        Args:
            index: of the layer in the pool's layout.
            q: [T, heads, key_dim] of all tokens of the forward.
            k: [T, kv_heads, key_dim].
            v: [T, kv_heads, value_dim].
            scores: scale, softcap and sinks.
            out: [T, heads, value_dim]: filled for tokens of prefills, unchanged for all other tokens.
        """
        if self._tokens is None:
            return
        keys, values = (k[self._tokens], v[self._tokens]) if self._stored is None else self._stored.read(index)
        out[self._tokens] = self._function.attend(
            q[self._tokens],
            keys,
            values,
            metadata=self._metadata,
            mask_kind=self._pool.layout.layers[index].mask_kind,
            scores=scores,
        )
