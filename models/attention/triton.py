"""Paged attention by Triton kernels that read pages in place, for GPUs.

`TritonBackend` allocates fresh metadata for each forward. For a CUDA graph, make metadata of a fixed size with
`TritonBackend.make_metadata`, fill it before each replay, and create the `TritonAttention` and run the model inside
the capture. Slabs may be added or dropped between replays: kernels read all that changes from the metadata and the
slab table.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch

from rollout.models.arrays import ceil_div, next_power_of_2
from rollout.models.attention import triton_kernels
from rollout.models.attention.base import RotatingAttention
from rollout.models.attention.interface import ScoreParams
from rollout.models.attention.kernel_test import TOLERANCE, Attention, HeadShape, largest_error
from rollout.models.attention.prefill import PrefillAttention, VarlenFunction
from rollout.models.attention.triton_metadata import MetadataSizes, TileKind, TileKinds, TritonMetadata, WorkItems
from rollout.models.device import launching_on
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.kv_cache.slab_table import SlabTable

LARGEST_DIM = 512
"""Largest head dim; tiles of larger heads would not fit into shared memory."""
LEAST_CAPABILITY = (8, 0)
"""Lowest compute capability; earlier GPUs do not multiply bfloat16."""

#: Most programs per multiprocessor; with more work items than programs, each program takes several.
_PROGRAMS = 16
#: Page table entries that one program looks up at a time.
_LOCATE_BLOCK = 256


@dataclass(frozen=True, slots=True)
class TileSizes:
    """Tile sizes of the attention kernel: fixed by head dim and dtype, since rounding depends on them."""

    queries: int
    """Rows of a tile: queries times heads that share keys."""
    keys: int
    warps: int
    stages: int = 3
    """Stages of the pipeline that loads addresses, then keys and values, then multiplies."""


#: By itemsize and largest head dim: sizes for one query with split keys, and for tiles of queries. Chosen by the
#: compiler's counts at compute capability 9.0, which ``python -m jobs.gpu.resources`` prints: no spilled registers, and
#: two programs or more per multiprocessor where there are such sizes (heads above 256 have one program of 8 warps).
#:
#: The pipeline loads ``(stages - 1) // 2`` tiles ahead, since the addresses of keys and values are loaded too: 3 stages
#: wait for a tile's loads before it is multiplied, 5 keep the next tile's under way.
_TILE_SIZES: dict[tuple[int, int], tuple[TileSizes, TileSizes]] = {
    (2, 64): (TileSizes(16, 128, 4, 5), TileSizes(128, 64, 8, 3)),
    (2, 128): (TileSizes(16, 64, 4, 5), TileSizes(64, 32, 4, 5)),
    (2, 256): (TileSizes(16, 32, 4, 5), TileSizes(64, 16, 4, 3)),
    (2, 512): (TileSizes(16, 16, 4, 5), TileSizes(32, 16, 8, 3)),
    (4, 64): (TileSizes(16, 32, 4, 5), TileSizes(32, 32, 4, 3)),
    (4, 128): (TileSizes(16, 32, 4, 5), TileSizes(32, 32, 4, 3)),
    (4, 256): (TileSizes(16, 16, 4, 5), TileSizes(16, 16, 4, 3)),
    (4, 512): (TileSizes(16, 16, 8, 3), TileSizes(16, 16, 8, 3)),
}


def tile_sizes(itemsize: int, dim: int, group: int, split: bool) -> TileSizes:
    """Return the tile sizes for an itemsize in bytes, a head dim, and ``group`` heads that share keys."""
    largest_dim = min(known for bytes_, known in _TILE_SIZES if bytes_ == itemsize and known >= dim)
    for_splits, for_tiles = _TILE_SIZES[itemsize, largest_dim]
    sizes = for_splits if split else for_tiles
    queries = max(sizes.queries, next_power_of_2(group))
    # More rows than the sizes were chosen for need the registers of more warps.
    return replace(sizes, queries=queries, warps=max(sizes.warps, min(8, queries // 16)))


def check(shapes: Collection[HeadShape], dtype: torch.dtype, device: torch.device, page_size: int) -> None:
    """Compile and run the kernels for these heads, and compare with reference attention.

    With the heads and page size of a model, most of what is compiled here is what its forwards run.

    Raises:
        ValueError: the dtype, head dims or device are not supported, or results differ from reference attention.
        Exception: Triton could not compile the kernels, or the device could not run them.
    """
    if dtype not in TOLERANCE:
        raise ValueError(f"the kernels do not support {dtype}")
    largest = max(max(shape.key_dim, shape.value_dim) for shape in shapes)
    if largest > LARGEST_DIM:
        raise ValueError(f"the largest head dim is {largest}, and the kernels support up to {LARGEST_DIM}")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise ValueError(f"the GPU's compute capability is below {'.'.join(map(str, LEAST_CAPABILITY))}")

    def attention(pool: PagePool, batch: ForwardBatch) -> Attention:
        attention = TritonBackend(pool)(pool, batch)
        # Both kernels that write: one for the first tokens, one for the others.
        return partial(_turning, attention) if batch.prefix_lens[0] else attention.compute

    error = largest_error(attention, dtype, sorted(shapes), device, page_size=page_size)
    if not error <= TOLERANCE[dtype]:
        raise ValueError(
            f"the kernels differ from reference attention by {error:.2g} in {dtype} (tolerance {TOLERANCE[dtype]:g})"
        )


def _turning(
    attention: TritonAttention, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: ScoreParams
) -> torch.Tensor:
    """Attend like `TritonAttention.compute` with heads that a quarter turn, which is exact, makes those of q and k."""
    half, odd = divmod(q.shape[-1], 2)
    if odd:
        return attention.compute(index, q, k, v, scores)
    q, k = (torch.cat((x[..., half:], -x[..., :half]), -1) for x in (q, k))
    cosines = torch.zeros((len(q), 2 * half), dtype=q.dtype, device=q.device)
    return attention.compute_rotating(index, q, k, v, (cosines, cosines + 1), scores)


class TritonAttention(RotatingAttention):
    """Serves one forward by Triton kernels; the constructor launches the kernel that looks up its pages.

    Args:
        pool: holds keys and values.
        batch: the sequences of the forward.
        metadata: filled from ``batch``; a CUDA graph refills it before each replay.
        prefills: attends for sequences with several new tokens; None uses the kernels.
    """

    name: ClassVar[str] = "triton"

    def __init__(
        self, pool: PagePool, batch: ForwardBatch, metadata: TritonMetadata, prefills: PrefillAttention | None = None
    ) -> None:
        super().__init__(pool, batch)
        self._prefills = prefills
        self._metadata, self._slabs = metadata, metadata.slabs
        self._programs = _PROGRAMS * _multiprocessors(pool.device)
        entries = len(metadata.pages)
        if entries:
            with launching_on(pool.device):
                triton_kernels.locate[(min(ceil_div(entries, _LOCATE_BLOCK), self._programs),)](
                    metadata.pages,
                    self._slabs.addresses,
                    metadata.slab_addresses,
                    metadata.first_tokens,
                    metadata.entries,
                    pool.slab_pages,
                    PAGE_SIZE=self.layout.page_size,
                    BLOCK=_LOCATE_BLOCK,
                )

    @property
    def rotates(self) -> bool:
        """See `RotatingAttention.rotates`; other functions for prefills read rotated keys of their own."""
        return self._prefills is None

    def compute(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: ScoreParams
    ) -> torch.Tensor:
        """See `PagedAttention.compute`."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = self._results(index, q)
        if len(out):
            with launching_on(self.pool.device):
                self._write(index, k, v, out)
                self._attend_pages(index, q, out, scores)
                if self._prefills is not None:
                    self._prefills.attend(index, q, k, v, scores, out)
        return out

    def compute_rotating(
        self,
        index: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        scores: ScoreParams,
    ) -> torch.Tensor:
        """See `RotatingAttention.compute_rotating`."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, rotated = self._results(index, q), torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if len(out):
            with launching_on(self.pool.device):
                self._rotate_and_write(index, q, k, v, angles, rotated, out)
                self._attend_pages(index, rotated, out, scores)
        return out

    def _results(self, index: int, q: torch.Tensor) -> torch.Tensor:
        """Allocate the results of a layer, for queries [T, heads, key_dim]."""
        tokens, heads, _ = q.shape
        if tokens != self._metadata.capacity.tokens:
            raise ValueError(f"Got {tokens} queries, but the metadata is for {self._metadata.capacity.tokens} tokens.")
        layer = self.layout.layers[index]
        return torch.empty((tokens, heads, layer.value_dim), dtype=self.layout.dtype, device=q.device)

    def _attend_pages(self, index: int, q: torch.Tensor, out: torch.Tensor, scores: ScoreParams) -> None:
        """Attend with queries whose keys and values are in their pages, where kernels do."""
        layer, heads = self.layout.layers[index], q.shape[1]
        splits = self._metadata.splits.get(layer.mask_kind)
        if splits is not None:
            self._attend_splits(index, q, out, scores, splits)
        if self._prefills is None:
            group = heads // layer.kv_heads
            sizes = self._tile_sizes(index, group, split=False)
            tiles = self._metadata.tiles(TileKind(layer.mask_kind, sizes.queries // group))
            if tiles is not None:
                self._attend(index, q, out, maxima=None, sums=None, scores=scores, work=tiles, sizes=sizes)

    def _tile_sizes(self, index: int, group: int, split: bool) -> TileSizes:
        layer = self.layout.layers[index]
        return tile_sizes(
            itemsize=self.layout.dtype.itemsize, dim=max(layer.key_dim, layer.value_dim), group=group, split=split
        )

    def _write(self, index: int, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        layer = self.layout.layers[index]
        triton_kernels.write[(len(out),)](
            k,
            v,
            out,
            self._metadata.slots,
            self._slabs.addresses,
            self._slabs.keys_at[index],
            self._slabs.values_at[index],
            self.pool.slab_pages * self.layout.page_size,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            KV_HEADS=layer.kv_heads,
            HEADS=out.shape[1],
            KEY_DIM=layer.key_dim,
            VALUE_DIM=layer.value_dim,
            BLOCK_HEADS=next_power_of_2(layer.kv_heads),
            BLOCK_KEY=next_power_of_2(layer.key_dim),
            BLOCK_VALUE=next_power_of_2(layer.value_dim),
        )

    def _rotate_and_write(
        self,
        index: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        rotated: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        layer, heads = self.layout.layers[index], q.shape[1]
        triton_kernels.rotate_and_write[(len(out), 2)](
            q,
            k,
            v,
            *angles,
            rotated,
            out,
            self._metadata.slots,
            self._slabs.addresses,
            self._slabs.keys_at[index],
            self._slabs.values_at[index],
            self.pool.slab_pages * self.layout.page_size,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            KV_HEADS=layer.kv_heads,
            HEADS=heads,
            HALF=layer.key_dim // 2,
            VALUE_DIM=layer.value_dim,
            BLOCK_KV_HEADS=next_power_of_2(layer.kv_heads),
            BLOCK_HEADS=next_power_of_2(heads),
            BLOCK_HALF=next_power_of_2(layer.key_dim // 2),
            BLOCK_VALUE=next_power_of_2(layer.value_dim),
            enable_fp_fusion=False,  # see `rotated_halves`
        )

    def _attend_splits(
        self, index: int, q: torch.Tensor, out: torch.Tensor, scores: ScoreParams, work: WorkItems
    ) -> None:
        layer, items = self.layout.layers[index], len(work.items)
        heads = q.shape[1]
        group = heads // layer.kv_heads
        # Not part of the metadata, so that CUDA graphs of all sizes can share this memory.
        partial, maxima, sums = (
            torch.empty(items * heads * size, dtype=torch.float32, device=q.device) for size in (layer.value_dim, 1, 1)
        )
        sizes = self._tile_sizes(index, group, split=True)
        self._attend(index, q, partial, maxima=maxima, sums=sums, scores=scores, work=work, sizes=sizes)
        # Also where each row has one split: a CUDA graph serves rows of any length, so no launch could be left out. If
        # the kernel above wrote the results of such rows itself, it would take more registers for all rows: of the
        # forms tried, one fits two programs instead of three for 6 heads of 128 dims, another spills in float32.
        triton_kernels.reduce[(len(work.rows), layer.kv_heads)](
            partial,
            maxima,
            sums,
            scores.sinks,
            out,
            work.rows,
            SINKS=scores.sinks is not None,
            KV_HEADS=layer.kv_heads,
            GROUP=group,
            VALUE_DIM=layer.value_dim,
            BLOCK_GROUP=next_power_of_2(group),
            BLOCK_VALUE=next_power_of_2(layer.value_dim),
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
        sizes: TileSizes,
    ) -> None:
        layer, metadata = self.layout.layers[index], self._metadata
        triton_kernels.attend[(min(len(work.items) * layer.kv_heads, self._programs),)](
            q,
            out,
            maxima,
            sums,
            scores.sinks,
            work.items,
            work.count,
            metadata.slab_addresses,
            metadata.first_tokens,
            self._slabs.keys_at[index],
            self._slabs.values_at[index],
            q.stride(0),
            q.stride(1),
            float(scores.scale),
            float(scores.softcap or 0.0),
            layer.mask_kind.size,
            SPLIT=maxima is not None,
            MASK=layer.mask_kind.kind,
            SOFTCAP=scores.softcap is not None,
            SINKS=scores.sinks is not None,
            PAGE_SIZE=self.layout.page_size,
            KV_HEADS=layer.kv_heads,
            GROUP=q.shape[1] // layer.kv_heads,
            KEY_DIM=layer.key_dim,
            VALUE_DIM=layer.value_dim,
            BLOCK_KEY=max(16, next_power_of_2(layer.key_dim)),
            BLOCK_VALUE=max(16, next_power_of_2(layer.value_dim)),
            QUERIES=sizes.queries,
            KEYS=sizes.keys,
            STAGES=sizes.stages,
            # Multiply float32 exactly; TF32 would round inputs to ten mantissa bits.
            PRECISION="ieee" if self.layout.dtype == torch.float32 else None,
            num_warps=sizes.warps,
        )


class TritonBackend:
    """Attends by Triton kernels over the pages of one pool.

    Args:
        pool: holds keys and values.
        function: attends in prefills; None uses the kernels.
    """

    def __init__(self, pool: PagePool, function: VarlenFunction | None = None) -> None:
        self.slabs = SlabTable(pool)
        """Shared by the metadata of all forwards."""
        self._function = function
        self._tile_kinds: TileKinds = {}
        self.name = TritonAttention.name if function is None else f"{function.name}+{TritonAttention.name}"

    @property
    def prefills_in_kernels(self) -> bool:
        """Whether prefills run in the kernels too, so that a CUDA graph may hold them."""
        return self._function is None

    def make_metadata(self, capacity: MetadataSizes) -> TritonMetadata:
        """Allocate metadata for forwards of at most this size; it can be refilled."""
        return TritonMetadata(capacity, self.slabs, self._tile_kinds)

    def __call__(self, pool: PagePool, batch: ForwardBatch) -> TritonAttention:
        """See `rollout.models.attention.base.AttentionBackend`."""
        assert pool is self.slabs.pool, "a Triton backend serves one pool"
        metadata = self.make_metadata(MetadataSizes.of(batch, pool.layout.page_size))
        metadata.fill(batch)
        prefills = None if self._function is None else PrefillAttention(pool, batch, self._function)
        return TritonAttention(pool, batch, metadata, prefills)


def _multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors; 1 on a CPU, where Triton's interpreter runs the kernels."""
    if device.type != "cuda":
        return 1
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)
