"""Paged attention by gathering pages and calling SDPA: the reference on every device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from rollout.models.attention import Scores
from rollout.models.layout import IntArray, Site, Span
from rollout.models.paged import PagedStep, Segment, SlabPart
from rollout.models.pages import PagePool

#: Gathered keys of one group of rows stay below this, so that they are still in cache when they are read.
_GROUP_BYTES = 2 << 20
#: A group's rows are padded to its longest; a row joins only while it is at least this share of it.
_GROUP_FILL = 0.8


class GatherPrefill(PagedStep):
    """A packed prefill ``[1, T]``: each segment attends to its own sequence, one after another."""

    def __init__(self, pool: PagePool, segments: Sequence[Segment]) -> None:
        size = pool.layout.page_size
        positions = [np.arange(s.start, s.end) for s in segments]
        super().__init__(
            pool,
            np.concatenate([s.pages[p // size] * size + p % size for s, p in zip(segments, positions, strict=True)]),
        )
        self._segments = tuple(segments)
        self._reads = [self.by_slab(s.pages, pool.slab_pages) if s.start else [] for s in segments]
        self._masks: dict[tuple[int, Span], torch.Tensor | None] = {}

    def read(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        """See `PagedStep.read`."""
        site = self.layout.sites[index]
        lengths = [segment.length for segment in self._segments]
        outputs = []
        for number, parts in enumerate(zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)):
            segment = self._segments[number]
            queries, keys, values = parts
            if segment.start:
                keys, values = (
                    _gather(self, self._reads[number], index, which, len(segment.pages)).flatten(0, 1)[: segment.end]
                    for which in ("keys", "values")
                )
            repeats = queries.shape[1] // site.kv_heads
            # [1, heads, tokens, dim]; keys repeated for every head of their group cost little at prefill
            queries, keys, values = (x.to(self.compute_dtype).transpose(0, 1)[None] for x in (queries, keys, values))
            keys, values = (x.repeat_interleave(repeats, dim=1) for x in (keys, values))
            sinks = None if scores.sinks is None else scores.sinks[None, :, None, None]
            out = softmax_attention(queries, keys, values, self._mask(number, site.span), scores, sinks)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs).to(v.dtype)

    def _mask(self, number: int, span: Span) -> torch.Tensor | None:
        """[t, end] of one segment, True where a query sees a key; None where that is plainly causal."""
        if (number, span) not in self._masks:
            segment = self._segments[number]
            queries, keys = np.arange(segment.start, segment.end), np.arange(segment.end)
            first = span.first_keys(queries)
            if segment.start == 0 and not first.any():
                self._masks[number, span] = None
            else:
                self._masks[number, span] = self.tensor((keys <= queries[:, None]) & (keys >= first[:, None]))
        return self._masks[number, span]


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of similar length that are gathered and attended together."""

    rows: torch.Tensor
    """[g] which of the step's rows."""
    reads: list[SlabPart]
    pages: int
    """Pages gathered for each row, padding included."""
    mask: torch.Tensor
    """[g, 1, 1, pages * page_size], 0 where the row sees the token and -inf elsewhere."""


class GatherDecode(PagedStep):
    """One new token for each row, ``[B, 1]``.

    Args:
        tables: [B, pages] page ids of each row; entries past a row's length are not read.
        lengths: [B] tokens of each row, the new one included.
    """

    def __init__(self, pool: PagePool, tables: IntArray, lengths: IntArray) -> None:
        size, last = pool.layout.page_size, lengths - 1
        super().__init__(pool, tables[np.arange(len(lengths)), last // size] * size + last % size)
        self._tables, self._last = tables, last
        self._groups: dict[Span, list[_Group]] = {}
        self._most_pages = 0
        self._workspace: dict[tuple[str, int], torch.Tensor] = {}

    def read(
        self,
        index: int,
        q: torch.Tensor,
        k: torch.Tensor,  # noqa: ARG002 - read back with the others
        v: torch.Tensor,
        scores: Scores,
    ) -> torch.Tensor:
        """See `PagedStep.read`."""
        site = self.layout.sites[index]
        if site.span not in self._groups:
            self._groups[site.span] = self._plan(site.span)
        output = v.new_empty(q.shape[0], q.shape[1], site.value_dim)
        q = q.to(self.compute_dtype)
        # The heads that share keys become query rows of one head: keys are read once for all of them.
        sinks = None if scores.sinks is None else scores.sinks.view(1, site.kv_heads, -1, 1)
        for group in self._groups[site.span]:
            rows = len(group.rows)
            keys, values = (
                self._gather(group, index, which).view(rows, -1, site.kv_heads, dim).transpose(1, 2)
                for which, dim in (("keys", site.key_dim), ("values", site.value_dim))
            )
            queries = q.index_select(0, group.rows).view(rows, site.kv_heads, -1, site.key_dim)
            out = softmax_attention(queries, keys, values, group.mask, scores, sinks)
            output.index_copy_(0, group.rows, out.reshape(rows, -1, site.value_dim).to(output.dtype))
        return output

    def _gather(self, group: _Group, index: int, which: str) -> torch.Tensor:
        """Into memory kept over the layers of the step: fresh large blocks would cost page faults in each."""
        count, site = len(group.rows) * group.pages, self.layout.sites[index]
        elements = self._most_pages * self.layout.page_size * _width(site, which)
        if (which, elements) not in self._workspace:
            empty = torch.empty(elements, dtype=self.layout.dtype, device=self.pool.device)
            self._workspace[which, elements] = empty
        out = self._workspace[which, elements][: count * self.layout.page_size * _width(site, which)]
        return _gather(self, group.reads, index, which, count, out).to(self.compute_dtype)

    def _plan(self, span: Span) -> list[_Group]:
        """Groups of similar length; of a window or chunk, only the pages that the row sees are gathered."""
        size = self.layout.page_size
        first_keys = span.first_keys(self._last)
        first_pages = first_keys // size
        counts = self._last // size - first_pages + 1
        order = np.argsort(-counts, kind="stable")
        page_bytes = size * max(_width(s, "keys") for s in self.layout.sites) * self.compute_dtype.itemsize
        groups, start = [], 0
        while start < len(order):
            longest = int(counts[order[start]])
            members = order[start : start + max(1, _GROUP_BYTES // (longest * page_bytes))]
            members = members[counts[members] >= _GROUP_FILL * longest]
            groups.append(self._group(members, first_pages[members], first_keys[members], longest))
            start += len(members)
        self._most_pages = max([self._most_pages, *(len(group.rows) * group.pages for group in groups)])
        return groups

    def _group(self, rows: IntArray, first_pages: IntArray, first_keys: IntArray, pages: int) -> _Group:
        size, last = self.layout.page_size, self._last[rows][:, None]
        # Past its last page a row gathers that page again: valid memory, and masked.
        columns = np.minimum(first_pages[:, None] + np.arange(pages), last // size)
        table = self._tables[rows[:, None], columns].ravel()
        positions = first_pages[:, None] * size + np.arange(pages * size)
        hidden = self.tensor((positions > last) | (positions < first_keys[:, None]))
        mask = torch.zeros(hidden.shape, dtype=self.compute_dtype, device=hidden.device)
        mask.masked_fill_(hidden, -torch.inf)
        return _Group(self.tensor(rows), self.by_slab(table, self.pool.slab_pages), pages, mask[:, None, None])


def _width(site: Site, which: str) -> int:
    return site.kv_heads * (site.key_dim if which == "keys" else site.value_dim)


def _gather(
    step: PagedStep, reads: Sequence[SlabPart], index: int, which: str, count: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """[count, page_size, kv_heads, dim]: the keys or values of ``count`` pages of one site."""
    memories = [(step.keys if which == "keys" else step.values)(read.slab, index) for read in reads]
    shape = (count, *memories[0].shape[1:])
    pages = memories[0].new_empty(shape) if out is None else out.view(shape)
    for read, memory in zip(reads, memories, strict=True):
        if read.where is None:
            torch.index_select(memory, 0, read.inside, out=pages)
        else:
            pages.index_copy_(0, read.where, memory.index_select(0, read.inside))
    return pages


def softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scores: Scores,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Weights of ``scores`` over [b, h, keys, dim], for query [b, h, t, key_dim]; ``mask`` None is causal.

    ``mask`` is boolean (True: seen) or additive; ``sinks`` broadcasts to [b, h, t, 1].
    """
    if scores.softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scores.scaling
        )
    logits = (query.float() @ key.float().transpose(-1, -2)) * scores.scaling
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
