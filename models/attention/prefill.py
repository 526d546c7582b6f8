"""Sequences with several new tokens, packed one after another, as attention functions of libraries take them.

Such functions read keys and values from one tensor, and the slabs of a pool are several. So a library attends where
that costs little: in a prefill, whose keys and values are the forward's own, or, where it goes on with a text that was
begun before, are gathered. Rows that decode are read in place by the engine's own kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch

from rollout.models.arrays import IntArray, uploaded
from rollout.models.attention.interface import ScoreParams
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import MaskKind
from rollout.models.kv_cache.page_pool import PagePool, Slots


@dataclass(frozen=True, slots=True)
class VarlenMetadata:
    """Where each of n sequences lies among packed queries and packed keys. Queries are the last tokens of each."""

    cu_seqlens_q: torch.Tensor
    """[n + 1] int32 on the device: 0, and where each sequence's queries end."""
    cu_seqlens_k: torch.Tensor
    """[n + 1] int32 on the device: the same of its keys."""
    max_seqlen_q: int
    """Of one sequence; at least 2."""
    max_seqlen_k: int


class VarlenFunction(Protocol):
    """Attention over packed sequences."""

    name: ClassVar[str]
    """As in `rollout.models.attention.names.ATTENTION_BACKENDS`."""

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packing: VarlenMetadata,
        span: MaskKind,
        scores: ScoreParams,
    ) -> torch.Tensor:
        """Causal attention within ``span``: q [T, heads, dim] over k, v [K, kv_heads, dim]. Returns [T, heads, dim].

        What comes out of a sequence must not depend on the others.

        Raises:
            UnsupportedAttention: it cannot make weights as ``scores`` asks.
        """
        ...

    def __hash__(self) -> int: ...


class PrefillAttention:
    """Those of a forward. What depends on lengths alone is planned once, and serves every site.

    Args:
        pool: where keys and values lie.
        packed: the forward.
        library: attends.
    """

    def __init__(self, pool: PagePool, packed: ForwardBatch, library: VarlenFunction) -> None:
        self._pool, self._library = pool, library
        several = packed.query_lens > 1
        lengths, ends = packed.query_lens[several], packed.seq_lens[several]
        self._tokens: slice | torch.Tensor | None = None
        if not len(lengths):
            return
        tokens = np.flatnonzero(np.repeat(several, packed.query_lens))
        first, last = int(tokens[0]), int(tokens[-1])
        # As the engine packs them, they lie side by side, unless one of a single token is among them.
        together = last - first + 1 == len(tokens)
        self._tokens = slice(first, last + 1) if together else uploaded(tokens, pool.device)
        begun = bool(packed.prefix_lens[several].any())
        self._stored = (
            Slots.of(pool, _slots(packed.page_tables[several], ends, pool.layout.page_size)) if begun else None
        )
        cu_seqlens_q, cu_seqlens_k = (
            uploaded(np.cumsum([0, *counts]).astype(np.int32), pool.device) for counts in (lengths, ends)
        )
        self._packing = VarlenMetadata(cu_seqlens_q, cu_seqlens_k, int(lengths.max()), int(ends.max()))

    def attend(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: ScoreParams, out: torch.Tensor
    ) -> None:
        """Attends at site ``index``, whose new keys and values stand in their pages already.

        Args:
            q: [T, heads, key_dim] of all tokens of the forward; k and v [T, kv_heads, dim].
            out: [T, heads, value_dim]: filled for tokens of these sequences, others are left as they are.
        """
        if self._tokens is None:
            return
        keys, values = (k[self._tokens], v[self._tokens]) if self._stored is None else self._stored.read(index)
        span = self._pool.layout.layers[index].mask_kind
        out[self._tokens] = self._library.attend(q[self._tokens], keys, values, self._packing, span, scores)


def _slots(tables: IntArray, ends: IntArray, page_size: int) -> IntArray:
    """Where all tokens of sequences lie, sequence after sequence."""
    rows = np.repeat(np.arange(len(ends)), ends)
    positions = np.arange(len(rows)) - np.repeat(np.cumsum(ends) - ends, ends)
    slots: IntArray = tables[rows, positions // page_size] * page_size + positions % page_size
    return slots
