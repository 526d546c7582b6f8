"""Metadata of a forward for the Triton kernels, in device memory that can be refilled in place.

Kernels read sequences and work items from fixed addresses, so a CUDA graph serves every forward that fits. What the
host plans depends on lengths alone, and serves every layer.

A work item is either one query over a split of its keys (`ForwardBatch.decodes`), or a tile of queries over all of
theirs. Splits begin at multiples of `SPLIT_TOKENS`, so their number depends only on the query's position in its own
sequence, not on the batch composition. How many queries a tile holds depends on the heads that share keys, which only
the model's forward tells. So the kinds of tiles that forwards have asked for are listed once per backend (`TileKinds`),
and all later metadata plan them when they are filled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from rollout.models.arrays import IntArray, ceil_div, upload
from rollout.models.attention.page_entries import Int32Array, PageEntries
from rollout.models.forward_batch import ForwardBatch, countdown
from rollout.models.kv_cache.layout import MaskKind
from rollout.models.kv_cache.slab_table import SlabTable

SPLIT_TOKENS = 256
"""Keys of one split."""
ITEM_FIELDS = 8
"""First query token, queries, position of the first, first key, end of keys, entry of the first page; two unused."""
ROW_FIELDS = 4
"""Query token, first item, number of items; one unused."""
_ALIGNMENT = 16
"""Elements; Triton compiles a kernel again for an argument that is not aligned to 16 bytes."""

_Array = TypeVar("_Array", torch.Tensor, Int32Array)


@dataclass(frozen=True, slots=True)
class MetadataSizes:
    """Size of a forward, or the largest size that metadata has room for."""

    decodes: int
    """Tokens that are attended one by one."""
    prefills: int
    """Sequences with tokens that are attended together."""
    tokens: int
    """New tokens in total, including padding."""
    entries: int
    """Page table entries in total; a shared page counts once per sequence."""
    splits: int = 0
    """Splits of the keys of the decoded tokens; 0 for at most one such token per sequence, which entries limit."""

    @classmethod
    def of(cls, batch: ForwardBatch, page_size: int) -> MetadataSizes:
        """Return the exact size of one forward."""
        decodes = batch.decodes
        several = bool((batch.decode_lens > 1).any())
        return cls(
            decodes=int(decodes.sum()),
            prefills=int(np.count_nonzero(batch.query_lens > decodes)),
            tokens=batch.tokens.shape[0],
            entries=int(_page_counts(batch, page_size).sum()),
            splits=int((_decoded(batch).positions // SPLIT_TOKENS + 1).sum()) if several else 0,
        )

    def tiles(self, queries: int) -> int:
        """Return the most tiles of so many queries that the prefills may make up; each may end with a partial one."""
        return self.tokens // queries + min(self.prefills, self.tokens)

    def holds(self, other: MetadataSizes) -> bool:
        """Return whether a forward of size ``other`` fits."""
        return (
            other.decodes <= self.decodes
            and other.prefills <= self.prefills
            and other.tokens <= self.tokens
            and other.entries <= self.entries
            and other.splits <= self.splits
        )


class TileKind(NamedTuple):
    """What the tiles of a layer's prefills depend on."""

    mask_kind: MaskKind
    queries: int
    """Most queries of a tile."""


TileKinds = dict[TileKind, None]
"""The kinds that a model has asked for, in order; shared by the metadata of all its forwards."""


@dataclass(frozen=True, slots=True)
class WorkItems:
    """Work items of one mask kind, in device memory."""

    items: torch.Tensor
    """[capacity, ITEM_FIELDS] int32."""
    count: torch.Tensor
    """[1] int32: number of items in use."""
    rows: torch.Tensor
    """[capacity, ROW_FIELDS] int32: the items of each decoding row; zeros past the rows in use; empty for tiles."""


class _Views(NamedTuple, Generic[_Array]):
    """Parts of the flat buffer that the host fills and copies to the device at once."""

    counts: _Array
    """[1 + mask kinds + tile kinds]: page entries, then work items of each mask kind and of each tile kind."""
    slots: _Array
    """[tokens]."""
    rows: list[_Array]
    """[decodes * ROW_FIELDS] for each mask kind."""
    items: list[_Array]
    """[items * ITEM_FIELDS] for each mask kind."""
    tiles: list[_Array]
    """[tiles * ITEM_FIELDS] for each tile kind."""
    pages: _Array
    """[entries]."""


class TritonMetadata:
    """Buffers of a fixed size, refilled for every forward by one copy to the device.

    Args:
        capacity: the largest forward. Tokens past those of a forward are padding: no page is read or written for them,
            and attention returns zeros.
        slabs: addresses of the pool's slabs.
        tile_kinds: the kinds of tiles that earlier forwards have asked for; `tiles` adds to them.
    """

    def __init__(self, capacity: MetadataSizes, slabs: SlabTable, tile_kinds: TileKinds) -> None:
        self.capacity = capacity
        self.slabs = slabs
        self.sealed = False
        """Whether `tiles` may no longer allocate: a CUDA graph is being captured, or reads these buffers."""
        self._known_tile_kinds = tile_kinds
        layout, device = slabs.pool.layout, slabs.pool.device
        self._page_size = layout.page_size
        mask_kinds = list(dict.fromkeys(layer.mask_kind for layer in layout.layers)) if capacity.decodes else []
        items = max(capacity.splits, capacity.decodes + capacity.entries * self._page_size // SPLIT_TOKENS)
        tile_counts = {kind: capacity.tiles(kind.queries) for kind in tile_kinds} if capacity.prefills else {}
        # Pages come last, so that unused entries need not be copied.
        sizes = [
            1 + len(mask_kinds) + len(tile_counts),
            capacity.tokens,
            *[capacity.decodes * ROW_FIELDS] * len(mask_kinds),
            *[items * ITEM_FIELDS] * len(mask_kinds),
            *(tiles * ITEM_FIELDS for tiles in tile_counts.values()),
            capacity.entries,
        ]
        starts = np.cumsum([0, *(ceil_div(size, _ALIGNMENT) * _ALIGNMENT for size in sizes)])
        self._regions = _Regions(
            tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=False)), len(mask_kinds)
        )
        self._host = np.zeros(starts[-1], np.int32)
        self._host_views = self._regions.of(self._host)
        self._device = torch.zeros(len(self._host), dtype=torch.int32, device=device)
        views = self._regions.of(self._device)
        self.entries = views.counts[:1]
        """[1] int32: page table entries of all sequences."""
        self.pages = views.pages
        """[entries] int32: the page tables of all sequences, one after the other (`PageEntries`)."""
        self.slots = views.slots
        """[tokens] int32: slot of each new token's keys and values; -1 for padding."""
        self.slab_addresses = torch.zeros(capacity.entries, dtype=torch.int64, device=device)
        """[entries] address of each page's slab; looked up by a kernel, so that CUDA graphs follow slabs too."""
        self.first_tokens = torch.zeros(capacity.entries, dtype=torch.int32, device=device)
        """[entries] each page's first token, counted from the start of its slab."""
        self.splits: dict[MaskKind, WorkItems] = {
            mask_kind: WorkItems(
                items=views.items[i].view(-1, ITEM_FIELDS),
                count=views.counts[1 + i : 2 + i],
                rows=views.rows[i].view(-1, ROW_FIELDS),
            )
            for i, mask_kind in enumerate(mask_kinds)
        }
        """Work items of decoding rows, by mask kind; empty if the capacity has no decodes."""
        first_count = 1 + len(mask_kinds)
        self._tiles: dict[TileKind, WorkItems] = {
            kind: WorkItems(
                items=views.tiles[i].view(-1, ITEM_FIELDS),
                count=views.counts[first_count + i : first_count + i + 1],
                rows=self._device[:0].view(0, ROW_FIELDS),
            )
            for i, kind in enumerate(tile_counts)
        }
        """Tiles that `fill` plans."""
        self._late_tiles: dict[TileKind, WorkItems] = {}
        """Tiles of the present forward whose kind was not known when the buffers were made."""
        self._pages = PageEntries(slabs)
        self._uploaded = False
        """Whether the device has what the host had after the last `fill`."""
        self._batch: ForwardBatch | None = None

    @property
    def bytes_held(self) -> int:
        """Bytes on the device."""
        return self._device.nbytes + self.slab_addresses.nbytes + self.first_tokens.nbytes

    def fill(self, batch: ForwardBatch) -> None:
        """Fill the buffers for a forward; sequences without new tokens are padding.

        Raises:
            ValueError: the forward is larger than the capacity.
            IndexError: the forward uses a page that is in no slab.
        """
        needs = MetadataSizes.of(batch, self._page_size)
        if not self.capacity.holds(needs):
            raise ValueError(f"A forward of {needs} does not fit into {self.capacity}.")
        self.slabs.refresh()
        page_counts = _page_counts(batch, self._page_size)
        views = self._host_views
        other_pages = self._pages.fill(views.pages, batch.page_tables, page_counts) or not self._uploaded
        self._uploaded = False
        views.counts[0] = self._pages.used
        views.slots[: needs.tokens] = batch.slot_mapping(self._page_size)
        views.slots[needs.tokens :] = -1
        for i, mask_kind in enumerate(self.splits):
            items, rows = views.items[i].reshape(-1, ITEM_FIELDS), views.rows[i].reshape(-1, ROW_FIELDS)
            views.counts[1 + i] = _fill_splits(items, rows, batch, self._pages.starts, mask_kind)
        for i, kind in enumerate(self._tiles):
            tiles = _tiles(batch, self._pages.starts, kind)
            views.counts[1 + len(self.splits) + i] = len(tiles)
            views.tiles[i][: tiles.size] = tiles.ravel()
        end = self._regions.pages.start + (self._pages.used if other_pages else 0)
        upload(self._host[:end], self._device)
        self._uploaded = True
        self._batch = batch
        self._late_tiles.clear()

    def tiles(self, kind: TileKind) -> WorkItems | None:
        """Return the prefills as tiles of a kind; None if the capacity has no prefills.

        Raises:
            RuntimeError: the kind is new, and the metadata are sealed.
        """
        if not self.capacity.prefills:
            return None
        found = self._tiles.get(kind) or self._late_tiles.get(kind)
        return self._plan_late(kind) if found is None else found

    def _plan_late(self, kind: TileKind) -> WorkItems:
        """Plan tiles of a kind that no forward has asked for before, outside of the buffers."""
        if self.sealed:
            raise RuntimeError(f"a forward asks for tiles of {kind.queries} queries, which no earlier one has")
        assert self._batch is not None, "metadata must be filled before use"
        self._known_tile_kinds[kind] = None
        items = _tiles(self._batch, self._pages.starts, kind)
        device = self._device.new_empty(1 + len(items), ITEM_FIELDS)
        upload(np.concatenate([items, np.full((1, ITEM_FIELDS), len(items), np.int32)]), device)
        work = WorkItems(items=device[:-1], count=device[-1, :1], rows=device[:0, :ROW_FIELDS])
        self._late_tiles[kind] = work
        return work


@dataclass(frozen=True, slots=True)
class _Regions:
    """Where the parts of `_Views` lie in the flat buffer."""

    slices: tuple[slice, ...]
    mask_kinds: int

    @property
    def pages(self) -> slice:
        """The last region."""
        return self.slices[-1]

    def of(self, flat: _Array) -> _Views[_Array]:
        """Return the parts of a flat buffer."""
        parts: list[_Array] = [flat[region] for region in self.slices]
        rows, items = 2 + self.mask_kinds, 2 + 2 * self.mask_kinds
        return _Views(
            counts=parts[0],
            slots=parts[1],
            rows=parts[2:rows],
            items=parts[rows:items],
            tiles=parts[items:-1],
            pages=parts[-1],
        )


def _page_counts(batch: ForwardBatch, page_size: int) -> IntArray:
    """Return [S]: pages of each sequence, 0 for padding."""
    pages: IntArray = ceil_div(batch.seq_lens, page_size) * (batch.query_lens > 0)
    return pages


class _Decoded(NamedTuple):
    """Tokens that are attended one by one."""

    sequences: IntArray
    tokens: IntArray
    """Their indices among the new tokens."""
    positions: IntArray


def _decoded(batch: ForwardBatch) -> _Decoded:
    """Return the tokens of a batch that are attended one by one, sequence by sequence."""
    if not len(batch.decode_lens):
        sequences = (batch.query_lens == 1).nonzero()[0]
        return _Decoded(sequences, batch.offsets[sequences], batch.prefix_lens[sequences])
    sequences, back = np.arange(len(batch.decode_lens)).repeat(batch.decode_lens), countdown(batch.decode_lens)
    ends = (batch.offsets + batch.query_lens)[sequences]
    return _Decoded(sequences, ends - back, batch.seq_lens[sequences] - back)


def _fill_splits(
    items: Int32Array, rows: Int32Array, batch: ForwardBatch, first_entries: IntArray, mask_kind: MaskKind
) -> int:
    """Write items [capacity, ITEM_FIELDS] and rows [capacity, ROW_FIELDS] of the decoded tokens; return the items."""
    sequences, tokens, positions = _decoded(batch)
    first_keys = mask_kind.first_keys(positions)
    first_splits = first_keys // SPLIT_TOKENS
    counts = positions // SPLIT_TOKENS - first_splits + 1
    ends = counts.cumsum()
    starts = ends - counts
    count = int(ends[-1]) if len(ends) else 0
    of = np.arange(len(tokens)).repeat(counts)
    begins = ((first_splits - starts).repeat(counts) + np.arange(count)) * SPLIT_TOKENS
    filled = items[:count]
    filled[:, 0] = tokens[of]
    filled[:, 1] = 1
    filled[:, 2] = positions[of]
    filled[:, 3] = begins
    filled[starts, 3] = np.maximum(first_keys, begins[starts])
    filled[:, 4] = begins + SPLIT_TOKENS
    filled[ends - 1, 4] = positions + 1
    filled[:, 5] = first_entries[sequences][of]
    rows[: len(tokens), 0] = tokens
    rows[: len(tokens), 1] = starts
    rows[: len(tokens), 2] = counts
    rows[len(tokens) :] = 0
    return count


def _tiles(batch: ForwardBatch, first_entries: IntArray, kind: TileKind) -> Int32Array:
    """Return items [n, ITEM_FIELDS] of the prefills, those with the most keys first to balance the last programs."""
    prefill_lens = batch.query_lens - batch.decodes
    prefills = np.flatnonzero(prefill_lens)
    lengths = prefill_lens[prefills]
    counts = ceil_div(lengths, kind.queries)
    starts = np.cumsum(counts) - counts
    of = np.repeat(np.arange(len(prefills)), counts)
    first = (np.arange(len(of)) - starts[of]) * kind.queries
    queries = np.minimum(kind.queries, lengths[of] - first)
    positions = batch.prefix_lens[prefills][of] + first
    items = np.zeros((len(of), ITEM_FIELDS), np.int32)
    items[:, 0] = batch.offsets[prefills][of] + first
    items[:, 1] = queries
    items[:, 2] = positions
    items[:, 3] = kind.mask_kind.first_keys(positions)
    items[:, 4] = positions + queries
    items[:, 5] = first_entries[prefills][of]
    return items[np.argsort(items[:, 3] - items[:, 4], kind="stable")]
