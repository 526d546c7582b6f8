"""Paged attention that gathers pages and calls SDPA; serves every device and is the slowest backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from rollout.models.arrays import IntArray, ceil_div, uploaded
from rollout.models.attention.base import PagedAttention
from rollout.models.attention.interface import ScoreParams
from rollout.models.attention.prefill import PrefillAttention, VarlenFunction
from rollout.models.device import cpu_multiplies
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import AttentionLayer, MaskKind
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.kv_cache.slab_index import SlabShare, gather, scatter, split_by_slab

#: Gathered keys of one group of rows stay below this size, so that they are still in the CPU cache when read.
_GROUP_BYTES = 2 << 20
#: Rows of a group are padded to the longest; a row joins only if its length is at least this share of the longest.
_GROUP_FILL = 0.8


@dataclass(frozen=True, slots=True)
class _Segment:
    """A prefill: a sequence with several new tokens, which attends by itself."""

    tokens: slice
    """Its new tokens among those of the forward."""
    start: int
    """Position of its first new token."""
    end: int
    """Tokens of the sequence, including the new ones."""
    pages: int
    reads: tuple[SlabShare, ...]
    """Its pages by slab; empty if all its tokens are new."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Decoding rows of similar length, gathered and attended in one call."""

    tokens: torch.Tensor
    """[g] their new tokens among those of the forward."""
    reads: tuple[SlabShare, ...]
    pages: int
    """Pages gathered per row, including padding."""
    mask: torch.Tensor
    """[g, 1, 1, pages * page_size] additive mask: 0 where the token sees the key, -inf elsewhere."""


class GatherAttention(PagedAttention):
    """Gathers the keys and values of each sequence. What depends on lengths alone is planned once, for all layers.

    Args:
        pool: holds keys and values.
        batch: the sequences of the forward.
        prefills: attends for sequences with several new tokens; None gathers for them too.
    """

    name: ClassVar[str] = "gather"

    def __init__(self, pool: PagePool, batch: ForwardBatch, prefills: PrefillAttention | None = None) -> None:
        super().__init__(pool, batch)
        self._prefills = prefills
        page_size = pool.layout.page_size
        slow = pool.device.type == "cpu" and not cpu_multiplies(pool.layout.dtype)
        self._compute_dtype = torch.float32 if slow else pool.layout.dtype
        self._writes = split_by_slab(batch.slot_mapping(page_size), pool.slab_pages * page_size, pool.device)
        self._decodes = np.flatnonzero(batch.query_lens == 1)
        segments = np.flatnonzero(batch.query_lens > 1) if prefills is None else ()
        self._segments = [self._segment(int(sequence)) for sequence in segments]
        self._groups: dict[MaskKind, list[_Group]] = {}
        self._masks: dict[tuple[int, MaskKind], torch.Tensor | None] = {}
        self._most_pages = 0
        self._workspace: dict[tuple[str, int], torch.Tensor] = {}

    def compute(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: ScoreParams
    ) -> torch.Tensor:
        """See `PagedAttention.compute`."""
        layer = self.layout.layers[index]
        slabs = [self.pool.slab(share.slab) for share in self._writes]
        scatter(self._writes, [slab.keys[index].flatten(0, 1) for slab in slabs], k)
        scatter(self._writes, [slab.values[index].flatten(0, 1) for slab in slabs], v)
        output = v.new_empty(q.shape[0], q.shape[1], layer.value_dim)
        self._attend_groups(index, q, scores, output)
        for segment in self._segments:
            self._attend_segment(segment, index, (q, k, v), scores, output)
        if self._prefills is not None:
            self._prefills.attend(index, q, k, v, scores, output)
        return output

    # -- prefills --------------------------------------------------------------------------------------

    def _segment(self, sequence: int) -> _Segment:
        start, length = int(self.batch.prefix_lens[sequence]), int(self.batch.query_lens[sequence])
        offset = int(self.batch.offsets[sequence])
        pages = ceil_div(start + length, self.layout.page_size)
        return _Segment(
            tokens=slice(offset, offset + length),
            start=start,
            end=start + length,
            pages=pages,
            reads=self._by_slab(self.batch.page_tables[sequence, :pages]) if start else (),
        )

    def _attend_segment(
        self,
        segment: _Segment,
        index: int,
        new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scores: ScoreParams,
        output: torch.Tensor,
    ) -> None:
        layer = self.layout.layers[index]
        queries, keys, values = (x[segment.tokens] for x in new)
        if segment.start:
            keys, values = (
                self._gather(segment.reads, index, which, segment.pages).flatten(0, 1)[: segment.end]
                for which in ("keys", "values")
            )
        repeats = queries.shape[1] // layer.kv_heads
        # [1, heads, tokens, dim]; repeating keys for every head of their group costs little in a prefill
        queries, keys, values = (x.to(self._compute_dtype).transpose(0, 1)[None] for x in (queries, keys, values))
        keys, values = (x.repeat_interleave(repeats, dim=1) for x in (keys, values))
        sinks = None if scores.sinks is None else scores.sinks[None, :, None, None]
        out = softmax_attention(queries, keys, values, self._mask(segment, layer.mask_kind), scores, sinks)
        output[segment.tokens] = out[0].transpose(0, 1).to(output.dtype)

    def _mask(self, segment: _Segment, mask_kind: MaskKind) -> torch.Tensor | None:
        """Return [t, end] of one prefill, True where a query sees a key; None if the mask is plainly causal."""
        key = (segment.tokens.start, mask_kind)
        if key not in self._masks:
            queries, keys = np.arange(segment.start, segment.end), np.arange(segment.end)
            first = mask_kind.first_keys(queries)
            if segment.start == 0 and not first.any():
                self._masks[key] = None
            else:
                self._masks[key] = self._tensor((keys <= queries[:, None]) & (keys >= first[:, None]))
        return self._masks[key]

    # -- decoding rows -----------------------------------------------------------------------------------

    def _attend_groups(self, index: int, q: torch.Tensor, scores: ScoreParams, output: torch.Tensor) -> None:
        layer = self.layout.layers[index]
        if layer.mask_kind not in self._groups:
            self._groups[layer.mask_kind] = self._plan(layer.mask_kind)
        # Heads that share keys become query rows of one head, so that keys are read once for all of them.
        sinks = None if scores.sinks is None else scores.sinks.view(1, layer.kv_heads, -1, 1)
        for group in self._groups[layer.mask_kind]:
            rows = len(group.tokens)
            keys, values = (
                self._gather_group(group, index, which).view(rows, -1, layer.kv_heads, dim).transpose(1, 2)
                for which, dim in (("keys", layer.key_dim), ("values", layer.value_dim))
            )
            queries = q.index_select(0, group.tokens).to(self._compute_dtype)
            queries = queries.view(rows, layer.kv_heads, -1, layer.key_dim)
            out = softmax_attention(queries, keys, values, group.mask, scores, sinks)
            output.index_copy_(0, group.tokens, out.reshape(rows, -1, layer.value_dim).to(output.dtype))

    def _gather_group(self, group: _Group, index: int, which: str) -> torch.Tensor:
        """Gather into a workspace shared by all layers; fresh large blocks would cost page faults in each layer."""
        count, layer = len(group.tokens) * group.pages, self.layout.layers[index]
        elements = self._most_pages * self.layout.page_size * _width(layer, which)
        if (which, elements) not in self._workspace:
            empty = torch.empty(elements, dtype=self.layout.dtype, device=self.pool.device)
            self._workspace[which, elements] = empty
        out = self._workspace[which, elements][: count * self.layout.page_size * _width(layer, which)]
        return self._gather(group.reads, index, which, count, out).to(self._compute_dtype)

    def _plan(self, mask_kind: MaskKind) -> list[_Group]:
        """Group decoding rows of similar length; with a window or chunk, only the pages that a row sees."""
        size = self.layout.page_size
        last = self.batch.prefix_lens[self._decodes]
        first_keys = mask_kind.first_keys(last)
        first_pages = first_keys // size
        counts = last // size - first_pages + 1
        order = np.argsort(-counts, kind="stable")
        page_bytes = size * max(_width(s, "keys") for s in self.layout.layers) * self._compute_dtype.itemsize
        groups, start = [], 0
        while start < len(order):
            longest = int(counts[order[start]])
            members = order[start : start + max(1, _GROUP_BYTES // (longest * page_bytes))]
            members = members[counts[members] >= _GROUP_FILL * longest]
            groups.append(self._group(self._decodes[members], first_pages[members], first_keys[members], longest))
            start += len(members)
        self._most_pages = max([self._most_pages, *(len(group.tokens) * group.pages for group in groups)])
        return groups

    def _group(self, sequences: IntArray, first_pages: IntArray, first_keys: IntArray, pages: int) -> _Group:
        size, last = self.layout.page_size, self.batch.prefix_lens[sequences][:, None]
        # Padding repeats a sequence's last page: valid memory, and masked.
        columns = np.minimum(first_pages[:, None] + np.arange(pages), last // size)
        table = self.batch.page_tables[sequences[:, None], columns].ravel()
        positions = first_pages[:, None] * size + np.arange(pages * size)
        hidden = self._tensor((positions > last) | (positions < first_keys[:, None]))
        mask = torch.zeros(hidden.shape, dtype=self._compute_dtype, device=hidden.device)
        mask.masked_fill_(hidden, -torch.inf)
        tokens = self._tensor(self.batch.offsets[sequences])
        return _Group(tokens, self._by_slab(table), pages, mask[:, None, None])

    # -- pages ---------------------------------------------------------------------------------------------

    def _by_slab(self, pages: IntArray) -> tuple[SlabShare, ...]:
        return split_by_slab(pages, self.pool.slab_pages, self.pool.device)

    def _gather(
        self, reads: Sequence[SlabShare], index: int, which: str, count: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return [count, page_size, kv_heads, dim]: the keys or values of ``count`` pages of one layer."""
        slabs = [self.pool.slab(read.slab) for read in reads]
        memories = [(slab.keys if which == "keys" else slab.values)[index] for slab in slabs]
        shape = (count, *memories[0].shape[1:])
        return gather(reads, memories, memories[0].new_empty(shape) if out is None else out.view(shape))

    def _tensor(self, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
        return uploaded(values, self.pool.device)


def _width(layer: AttentionLayer, which: str) -> int:
    return layer.kv_heads * (layer.key_dim if which == "keys" else layer.value_dim)


def softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scores: ScoreParams,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend with query [b, h, t, key_dim] to key, value [b, h, keys, dim].

    ``mask`` is boolean (True: seen), additive, or None for causal; ``sinks`` broadcasts to [b, h, t, 1].
    """
    if scores.softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scores.scale
        )
    logits = (query.float() @ key.float().transpose(-1, -2)) * scores.scale
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    if mask is None:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if sinks is None:
        weights = logits.softmax(-1)
    else:
        column = sinks.to(logits).expand(*logits.shape[:-1], 1)
        weights = torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    return (weights @ value.float()).to(query.dtype)


@dataclass(frozen=True, slots=True)
class GatherBackend:
    """Gathers pages for decoding rows; a varlen function attends in prefills."""

    function: VarlenFunction

    @property
    def name(self) -> str:
        return f"{self.function.name}+{GatherAttention.name}"

    def __call__(self, pool: PagePool, batch: ForwardBatch) -> GatherAttention:
        # Pages are gathered for sequences with one new token, and the function attends in all others.
        whole = replace(batch, decode_lens=np.zeros(0, np.int64))
        return GatherAttention(pool, batch, PrefillAttention(pool, whole, self.function))
