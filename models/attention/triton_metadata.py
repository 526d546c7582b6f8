"""What attention kernels must know of a forward, in device memory that may be refilled in place.

Kernels get the same addresses at every step, and read from them which sequences there are, so launches that were
captured once serve every step that fits. What the host plans depends on lengths alone, and serves every site.

An item of work is one query over a part of its keys, or a tile of queries over all of theirs. The parts into which a
query's keys are split begin at multiples of `SPLIT_TOKENS`: how many there are follows from the query's place in its
own text alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rollout.models.arrays import IntArray, upload
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import MaskKind
from rollout.models.kv_cache.slab_table import SlabTable

SPLIT_TOKENS = 256
"""Keys that one program reads for a query."""
ITEM_FIELDS = 8
"""First query token, queries, its position, first key, end of keys, entry of the first page; two unused."""
ROW_FIELDS = 4
"""Query token, first item, number of items; one unused."""
_ALIGNED = 16
"""Numbers; kernels are compiled anew for an argument that is not aligned to 16 bytes."""

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class MetadataSizes:
    """The largest forward that buffers are for."""

    decodes: int
    """Sequences with one new token."""
    prefills: int
    """Sequences with more."""
    tokens: int
    """New tokens of all, padding included."""
    entries: int
    """Pages of all; one that several sequences share counts for each."""

    @classmethod
    def of(cls, packed: ForwardBatch, page_size: int) -> MetadataSizes:
        """Just enough for one forward."""
        single, more = int((packed.query_lens == 1).sum()), int((packed.query_lens > 1).sum())
        return cls(single, more, len(packed.tokens), int(_pages_of(packed, page_size).sum()))

    def holds(self, other: MetadataSizes) -> bool:
        """Whether buffers of this size can be filled with what needs ``other``."""
        return (
            other.decodes <= self.decodes
            and other.prefills <= self.prefills
            and other.tokens <= self.tokens
            and other.entries <= self.entries
        )


@dataclass(frozen=True, slots=True)
class WorkItems:
    """Items of one kind, in device memory."""

    items: torch.Tensor
    """[most, ITEM_FIELDS] int32."""
    count: torch.Tensor
    """[1] int32: how many there are now."""
    rows: torch.Tensor
    """[most, ROW_FIELDS] int32: which items make up a query; of no items past those that there are now."""


class TritonMetadata:
    """Buffers of one size, filled anew for every forward, by one copy.

    Args:
        room: what they are for. Tokens past those of a forward are padding: nothing is read or written for them,
            and attention gives zeros.
        slabs: of the pool whose pages forwards read.
    """

    def __init__(self, room: MetadataSizes, slabs: SlabTable) -> None:
        self.room = room
        self.slabs = slabs
        layout, device = slabs.pool.layout, slabs.pool.device
        self._page_size, self._slab_pages = layout.page_size, slabs.pool.slab_pages
        spans = list(dict.fromkeys(site.mask_kind for site in layout.layers)) if room.decodes else []
        items = room.decodes + room.entries * self._page_size // SPLIT_TOKENS
        # Pages come last: what is past them is not copied.
        sizes = [
            1 + len(spans),
            room.tokens,
            *(room.decodes * ROW_FIELDS, items * ITEM_FIELDS) * len(spans),
            room.entries,
        ]
        places = np.cumsum([0, *(-(-size // _ALIGNED) * _ALIGNED for size in sizes)])
        self._host = np.zeros(places[-1], np.int32)
        self._device = torch.zeros(len(self._host), dtype=torch.int32, device=device)
        self._regions = [slice(place, place + size) for place, size in zip(places, sizes, strict=False)]
        counts, slots, *of_spans, pages = (self._device[region] for region in self._regions)
        self.entries = counts[:1]
        """[1] int32: pages of all sequences."""
        self.pages = pages
        """[entries] int32: the pages of all sequences, one after another."""
        self.slots = slots
        """[tokens] int32: where each new token's keys and values go, counted in tokens of the pool; -1 nowhere."""
        self.slab_addresses = torch.zeros(room.entries, dtype=torch.int64, device=device)
        """[entries] of each page: its slab's address; found by a kernel, so that captured steps follow slabs too."""
        self.first_tokens = torch.zeros(room.entries, dtype=torch.int32, device=device)
        """[entries] of each page: its first token, counted in its slab."""
        self.splits: dict[MaskKind, WorkItems] = {
            span: WorkItems(items.view(-1, ITEM_FIELDS), counts[1 + i :][:1], rows.view(-1, ROW_FIELDS))
            for i, (span, rows, items) in enumerate(zip(spans, of_spans[::2], of_spans[1::2], strict=True))
        }
        """Sequences with one new token, their keys split; empty where there is no room for any."""
        self._tiles: dict[tuple[MaskKind, int], WorkItems] = {}
        self._packed: ForwardBatch | None = None

    def fill(self, packed: ForwardBatch) -> None:
        """Takes a forward; sequences without new tokens are padding.

        Raises:
            ValueError: it does not fit.
            IndexError: a page of it is in no slab.
        """
        needs = MetadataSizes.of(packed, self._page_size)
        if not self.room.holds(needs):
            raise ValueError(f"A forward that needs {needs} does not fit into {self.room}.")
        self.slabs.follow()
        held = _pages_of(packed, self._page_size)
        used = packed.page_tables[np.arange(packed.page_tables.shape[1]) < held[:, None]]
        of_slabs, live = used // self._slab_pages, self.slabs.live
        # A kernel that reads from nowhere takes the whole process's device down with it.
        if len(used) and (used.min() < 0 or of_slabs.max() >= len(live) or not live[of_slabs].all()):
            raise IndexError("A sequence of the step needs a page that is in no slab of the pool.")
        counts, slots, *of_spans, pages = (self._host[region] for region in self._regions)
        counts[0] = len(used)
        slots[: len(packed.tokens)] = packed.slot_mapping(self._page_size)
        slots[len(packed.tokens) :] = -1
        pages[: len(used)] = used
        for i, (span, rows, items) in enumerate(zip(self.splits, of_spans[::2], of_spans[1::2], strict=True)):
            its_items, its_rows = _splits(packed, held, span)
            counts[1 + i] = len(its_items)
            items[: its_items.size] = its_items.ravel()
            rows[: its_rows.size] = its_rows.ravel()
            rows[its_rows.size :] = 0
        upload(self._host[: self._regions[-1].start + len(used)], self._device)
        self._packed = packed
        self._tiles.clear()

    def tiles(self, span: MaskKind, queries: int) -> WorkItems | None:
        """Sequences with more new tokens, in tiles of at most so many queries; None where there are none.

        Not for captured steps: planned when first asked for.
        """
        if not self.room.prefills:
            return None
        assert self._packed is not None, "buffers are filled before they are used"
        if (span, queries) not in self._tiles:
            items = _tiles(self._packed, _pages_of(self._packed, self._page_size), span, queries)
            device = self._device.new_empty(1 + len(items), ITEM_FIELDS)
            upload(np.concatenate([items, np.full((1, ITEM_FIELDS), len(items), np.int32)]), device)
            self._tiles[span, queries] = WorkItems(device[:-1], device[-1, :1], device[:0, :ROW_FIELDS])
        return self._tiles[span, queries]


def _pages_of(packed: ForwardBatch, page_size: int) -> IntArray:
    """[S] pages of each sequence; none of padding."""
    pages: IntArray = np.where(packed.query_lens > 0, -(-packed.seq_lens // page_size), 0)
    return pages


def _splits(packed: ForwardBatch, held: IntArray, span: MaskKind) -> tuple[Int32Array, Int32Array]:
    """Items [n, ITEM_FIELDS] and rows [singles, ROW_FIELDS], of sequences that hold so many pages [S]."""
    singles = np.flatnonzero(packed.query_lens == 1)
    tokens, positions = packed.offsets[singles], packed.prefix_lens[singles]
    begins = span.first_keys(positions)
    first = begins // SPLIT_TOKENS
    counts = positions // SPLIT_TOKENS - first + 1
    starts = np.cumsum(counts) - counts
    of = np.repeat(np.arange(len(singles)), counts)
    split = first[of] + np.arange(len(of)) - starts[of]
    items = np.zeros((len(of), ITEM_FIELDS), np.int32)
    items[:, 0], items[:, 1], items[:, 2] = tokens[of], 1, positions[of]
    items[:, 3] = np.maximum(begins[of], split * SPLIT_TOKENS)
    items[:, 4] = np.minimum(positions[of] + 1, (split + 1) * SPLIT_TOKENS)
    items[:, 5] = (np.cumsum(held) - held)[singles][of]
    rows = np.zeros((len(singles), ROW_FIELDS), np.int32)
    rows[:, 0], rows[:, 1], rows[:, 2] = tokens, starts, counts
    return items, rows


def _tiles(packed: ForwardBatch, held: IntArray, span: MaskKind, most: int) -> Int32Array:
    """Items [n, ITEM_FIELDS], those with the most keys first, so that the shortest fill the end."""
    segments = np.flatnonzero(packed.query_lens > 1)
    lengths = packed.query_lens[segments]
    counts = -(-lengths // most)
    starts = np.cumsum(counts) - counts
    of = np.repeat(np.arange(len(segments)), counts)
    first = (np.arange(len(of)) - starts[of]) * most
    queries = np.minimum(most, lengths[of] - first)
    positions = packed.prefix_lens[segments][of] + first
    items = np.zeros((len(of), ITEM_FIELDS), np.int32)
    items[:, 0], items[:, 1], items[:, 2] = packed.offsets[segments][of] + first, queries, positions
    items[:, 3] = span.first_keys(positions)
    items[:, 4] = positions + queries
    items[:, 5] = (np.cumsum(held) - held)[segments][of]
    return items[np.argsort(items[:, 3] - items[:, 4], kind="stable")]
