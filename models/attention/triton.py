"""Paged attention by Triton kernels that read pages in place, for GPUs.

`TritonBackend` allocates fresh metadata for each forward. For a CUDA graph, make metadata of a fixed size with
`TritonBackend.make_metadata`, fill it before each replay, and create the `TritonAttention` and run the model inside
the capture. Slabs may be added or dropped between replays: kernels read all that changes from the metadata and the
slab table.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rollout.models.attention import triton_kernels
from rollout.models.attention.base import PagedAttention
from rollout.models.attention.interface import ScoreParams
from rollout.models.attention.kernel_test import TOLERANCE, Attention, largest_error
from rollout.models.attention.prefill import PrefillAttention, VarlenFunction
from rollout.models.attention.triton_metadata import MetadataSizes, TritonMetadata, WorkItems
from rollout.models.device import launching_on
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.kv_cache.slab_table import SlabTable

LARGEST_DIM = 512
"""Of a head; tiles of larger ones would not fit into shared memory."""
LEAST_CAPABILITY = (8, 0)
"""Of a GPU; earlier ones do not multiply bfloat16."""

#: Programs for each multiprocessor at most; beyond that they take several items of work each.
_PROGRAMS = 16
#: Entries of page tables that one program looks up at a time.
_LOCATE_BLOCK = 256


@dataclass(frozen=True, slots=True)
class TileSizes:
    """How the attention kernel is cut. Fixed by head size and dtype, since the last bits of results depend on it."""

    queries: int
    """Rows of a tile: queries times heads that share keys."""
    keys: int
    warps: int
    stages: int = 3
    """Of the pipeline that loads addresses, then keys and values, then multiplies."""


#: By bytes of a number and the largest head size: for one query, and for tiles of queries. By what the compiler says of
#: registers and shared memory for compute capability 9.0: no spills for one query, 2 to 5 programs a multiprocessor.
_BLOCKS: dict[tuple[int, int], tuple[TileSizes, TileSizes]] = {
    (2, 64): (TileSizes(16, 128, 4), TileSizes(128, 64, 8)),
    (2, 128): (TileSizes(16, 64, 4), TileSizes(128, 64, 8)),
    (2, 256): (TileSizes(16, 32, 4), TileSizes(64, 32, 8)),
    (2, 512): (TileSizes(16, 16, 4), TileSizes(32, 16, 8)),
    (4, 64): (TileSizes(16, 32, 4), TileSizes(32, 32, 4)),
    (4, 128): (TileSizes(16, 32, 4), TileSizes(32, 32, 4)),
    (4, 256): (TileSizes(16, 16, 4), TileSizes(16, 16, 4)),
    (4, 512): (TileSizes(16, 16, 8), TileSizes(16, 16, 8)),
}


def tile_sizes(itemsize: int, dim: int, group: int, split: bool) -> TileSizes:
    """The cut for numbers of so many bytes, heads of at most ``dim``, and ``group`` heads that share keys."""
    largest = min(size for bytes_, size in _BLOCKS if bytes_ == itemsize and size >= dim)
    chosen = _BLOCKS[itemsize, largest][0 if split else 1]
    return TileSizes(max(chosen.queries, _power(group)), chosen.keys, chosen.warps, chosen.stages)


def check(dims: Collection[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
    """Compiles and runs the kernels on heads of these sizes (key, value), and compares with plain attention.

    Raises:
        ValueError: such numbers, sizes or devices are not served, or the kernels compute something else.
        Exception: whatever Triton or the device has to say when they cannot be compiled or run.
    """
    if dtype not in TOLERANCE:
        raise ValueError(f"there are no kernels for {dtype}")
    if max(map(max, dims)) > LARGEST_DIM:
        raise ValueError(f"heads have more than {LARGEST_DIM} numbers")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise ValueError(f"its compute capability is below {'.'.join(map(str, LEAST_CAPABILITY))}")

    def attention(pool: PagePool, packed: ForwardBatch) -> Attention:
        return TritonBackend(pool)(pool, packed).compute

    error = largest_error(attention, dtype, tuple(sorted(dims)), device)
    if not error <= TOLERANCE[dtype]:
        raise ValueError(f"the kernels compute something else in {dtype} (by {error:.2g})")


class TritonAttention(PagedAttention):
    """One forward; making it launches the look-up of its pages.

    Args:
        buffers: filled with ``packed``, or with another forward at each replay of a capture.
        prefills: attends for sequences with several new tokens, instead; never in a capture, which has none.
    """

    name: ClassVar[str] = "triton"

    def __init__(
        self, pool: PagePool, packed: ForwardBatch, buffers: TritonMetadata, prefills: PrefillAttention | None = None
    ) -> None:
        super().__init__(pool, packed)
        self._prefills = prefills
        self._buffers, self._slabs = buffers, buffers.slabs
        self._programs = _PROGRAMS * _multiprocessors(pool.device)
        entries = len(buffers.pages)
        if entries:
            with launching_on(pool.device):
                triton_kernels.locate[(min(-(-entries // _LOCATE_BLOCK), self._programs),)](
                    buffers.pages,
                    self._slabs.addresses,
                    buffers.slab_addresses,
                    buffers.first_tokens,
                    buffers.entries,
                    pool.slab_pages,
                    PAGE_SIZE=self.layout.page_size,
                    BLOCK=_LOCATE_BLOCK,
                )

    def compute(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: ScoreParams
    ) -> torch.Tensor:
        """See `PagedAttention.compute`."""
        site = self.layout.layers[index]
        tokens, heads, _ = q.shape
        if tokens != self._buffers.room.tokens:
            raise ValueError(f"{tokens} queries came, but the step's buffers are for {self._buffers.room.tokens}.")
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty((tokens, heads, site.value_dim), dtype=self.layout.dtype, device=q.device)
        if not tokens:
            return out
        with launching_on(self.pool.device):
            self._write(index, k, v, out)
            splits = self._buffers.splits.get(site.mask_kind)
            if splits is not None:
                self._attend_splits(index, q, out, scores, splits)
            if self._prefills is not None:
                self._prefills.attend(index, q, k, v, scores, out)
                return out
            most = tile_sizes(
                self.layout.dtype.itemsize, max(site.key_dim, site.value_dim), heads // site.kv_heads, False
            )
            tiles = self._buffers.tiles(site.mask_kind, most.queries // (heads // site.kv_heads))
            if tiles is not None:
                self._attend(index, q, out, None, None, scores, tiles, most)
        return out

    def _write(self, index: int, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        site = self.layout.layers[index]
        triton_kernels.write[(len(out),)](
            k,
            v,
            out,
            self._buffers.slots,
            self._slabs.addresses,
            self._slabs.keys_at[index],
            self._slabs.values_at[index],
            self.pool.slab_pages * self.layout.page_size,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            KV_HEADS=site.kv_heads,
            HEADS=out.shape[1],
            KEY_DIM=site.key_dim,
            VALUE_DIM=site.value_dim,
            BLOCK_HEADS=_power(site.kv_heads),
            BLOCK_KEY=_power(site.key_dim),
            BLOCK_VALUE=_power(site.value_dim),
        )

    def _attend_splits(
        self, index: int, q: torch.Tensor, out: torch.Tensor, scores: ScoreParams, work: WorkItems
    ) -> None:
        site, items = self.layout.layers[index], len(work.items)
        heads = q.shape[1]
        group = heads // site.kv_heads
        # Not in the buffers: captured steps of all sizes can have the same memory for it.
        partial, maxima, sums = (
            torch.empty(items * heads * size, dtype=torch.float32, device=q.device) for size in (site.value_dim, 1, 1)
        )
        cut = tile_sizes(self.layout.dtype.itemsize, max(site.key_dim, site.value_dim), group, True)
        self._attend(index, q, partial, maxima, sums, scores, work, cut)
        triton_kernels.reduce[(len(work.rows), site.kv_heads)](
            partial,
            maxima,
            sums,
            scores.sinks,
            out,
            work.rows,
            SINKS=scores.sinks is not None,
            KV_HEADS=site.kv_heads,
            GROUP=group,
            VALUE_DIM=site.value_dim,
            BLOCK_GROUP=_power(group),
            BLOCK_VALUE=_power(site.value_dim),
        )

    def _attend(
        self,
        index: int,
        q: torch.Tensor,
        out: torch.Tensor,
        maxima: torch.Tensor | None,
        sums: torch.Tensor | None,
        scores: ScoreParams,
        work: WorkItems,
        cut: TileSizes,
    ) -> None:
        site, buffers = self.layout.layers[index], self._buffers
        triton_kernels.attend[(min(len(work.items) * site.kv_heads, self._programs),)](
            q,
            out,
            maxima,
            sums,
            scores.sinks,
            work.items,
            work.count,
            buffers.slab_addresses,
            buffers.first_tokens,
            self._slabs.keys_at[index],
            self._slabs.values_at[index],
            q.stride(0),
            q.stride(1),
            float(scores.scale),
            float(scores.softcap or 0.0),
            site.mask_kind.size,
            SPLIT=maxima is not None,
            MASK=site.mask_kind.kind,
            SOFTCAP=scores.softcap is not None,
            SINKS=scores.sinks is not None,
            PAGE_SIZE=self.layout.page_size,
            KV_HEADS=site.kv_heads,
            GROUP=q.shape[1] // site.kv_heads,
            KEY_DIM=site.key_dim,
            VALUE_DIM=site.value_dim,
            BLOCK_KEY=max(16, _power(site.key_dim)),
            BLOCK_VALUE=max(16, _power(site.value_dim)),
            QUERIES=cut.queries,
            KEYS=cut.keys,
            STAGES=cut.stages,
            # Products of float32 as they are; anything else would be rounded to ten bits.
            PRECISION="ieee" if self.layout.dtype == torch.float32 else None,
            num_warps=cut.warps,
        )


class TritonBackend:
    """Makes steps for the forwards of one pool.

    Args:
        pool: where keys and values lie.
        library: attends in prefills, instead of the kernels.
    """

    def __init__(self, pool: PagePool, library: VarlenFunction | None = None) -> None:
        self.slabs = SlabTable(pool)
        """Shared by all buffers."""
        self._library = library
        self.name = TritonAttention.name if library is None else f"{library.name}+{TritonAttention.name}"

    def make_metadata(self, room: MetadataSizes) -> TritonMetadata:
        """Buffers for forwards of up to a size, to be filled again and again."""
        return TritonMetadata(room, self.slabs)

    def __call__(self, pool: PagePool, packed: ForwardBatch) -> TritonAttention:
        """See `rollout.models.attention.base.AttentionBackend`."""
        assert pool is self.slabs.pool, "steps are made for one pool"
        buffers = self.make_metadata(MetadataSizes.of(packed, pool.layout.page_size))
        buffers.fill(packed)
        prefills = None if self._library is None else PrefillAttention(pool, packed, self._library)
        return TritonAttention(pool, packed, buffers, prefills)


def _power(size: int) -> int:
    """The power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def _multiprocessors(device: torch.device) -> int:
    """1 without a GPU, where kernels run in Triton's interpreter."""
    if device.type != "cuda":
        return 1
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)
