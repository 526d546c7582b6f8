"""Measure kernels alone: attention and its cuts, matrix products alone and merged, sampling, norms, bits by rows.

python -m jobs.gpu.micro
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jobs.bench.decode_bandwidth import copy_bandwidth
from jobs.gpu.common import CUDA, DEVICE, TINY, ended, graphed, guarded, say, synchronize, timed
from rollout.models.arrays import ceil_div
from rollout.models.attention import triton as kernels
from rollout.models.attention import triton_metadata
from rollout.models.attention.interface import ScoreParams
from rollout.models.attention.triton import TileSizes
from rollout.models.attention.triton_metadata import MetadataSizes
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.sampling.sampler import RowSampling, sample

DTYPE = torch.bfloat16 if CUDA else torch.float32
PAGE_SIZE = 16
#: KV heads, query heads of each, head size
HEADS = {"tiny": (1, 2, 16)} if TINY else {"qwen1.5b": (2, 6, 128), "llama8b": (8, 4, 128)}
#: Rows, tokens of each
DECODES = ((3, 40),) if TINY else ((64, 1024), (256, 1024), (16, 8192), (1, 32768), (1024, 512))
SPLIT_CUTS = (
    (TileSizes(16, 64, 4, 3), 256),
    (TileSizes(16, 64, 4, 3), 512),
    (TileSizes(16, 64, 4, 5), 256),
    (TileSizes(16, 64, 2, 3), 256),
    (TileSizes(16, 32, 4, 5), 256),
    (TileSizes(16, 128, 4, 3), 256),
    (TileSizes(16, 128, 8, 3), 512),
    (TileSizes(16, 64, 8, 3), 256),
)
TILE_CUTS = (TileSizes(64, 32, 4, 5), TileSizes(64, 32, 4), TileSizes(64, 64, 4), TileSizes(128, 64, 8))
#: Hidden size, sizes of query, key and value, intermediate size
PRODUCTS = (
    {"tiny": (64, (64, 32, 32), 96)}
    if TINY
    else {"qwen1.5b": (1536, (1536, 256, 256), 8960), "llama8b": (4096, (4096, 1024, 1024), 14336)}
)
#: Output and input size of the products of a model
LINEARS = (
    {"tiny": (32, 16)}
    if TINY
    else {"qkv": (256, 1536), "o": (1536, 1536), "up": (8960, 1536), "down": (1536, 8960), "head": (151_936, 1536)}
)
LAUNCHES = 64
ROW_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)


@contextmanager
def cut(
    split: TileSizes | None = None, tiles: TileSizes | None = None, split_tokens: int | None = None
) -> Iterator[None]:
    """Cut the attention kernel otherwise, for heads of any size."""
    blocks: dict[tuple[int, int], tuple[TileSizes, TileSizes]] = kernels._TILE_SIZES
    metadata: Any = triton_metadata
    saved, saved_tokens = dict(blocks), metadata.SPLIT_TOKENS
    try:
        for key, (one, many) in saved.items():
            blocks[key] = (split or one, tiles or many)
        metadata.SPLIT_TOKENS = split_tokens or saved_tokens
        yield
    finally:
        blocks.update(saved)
        metadata.SPLIT_TOKENS = saved_tokens


def randoms(*shape: int) -> torch.Tensor:
    """Draw numbers in the dtype that is measured."""
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def pool_for(pages: int, layout: KVLayout, slab_pages: int) -> PagePool:
    """Make a pool with so many free pages."""
    pool = PagePool(layout, slab_pages, DEVICE)
    while pool.free_pages < pages:
        pool.grow()
    return pool


def decode_seconds(rows: int, context: int, heads: tuple[int, int, int], sites: int = 4) -> tuple[float, int]:
    """Measure attention of rows that decode: seconds of one layer, and the bytes of keys and values that it reads.

    Layers take turns, so that what one reads is not in the cache when it comes again.
    """
    kv_heads, group, dim = heads
    layout = KVLayout(
        tuple(AttentionLayer(None, kv_heads, dim, dim, MaskKind()) for _ in range(sites)), DTYPE, PAGE_SIZE
    )
    pages = ceil_div(context, PAGE_SIZE) * rows
    pool = pool_for(pages, layout, max(1, min(pages // 4, (1 << 30) // layout.bytes_per_page)))
    tables = np.random.default_rng(0).permutation(pool.allocate(pages)).reshape(rows, -1)
    for slab in filter(None, pool.slabs):
        for tensor in slab.tensors:
            tensor.normal_()
    tokens = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    packed = ForwardBatch(tokens, tables, np.full(rows, context - 1), np.ones(rows, np.int64))
    buffers = kernels.TritonBackend(pool).make_metadata(MetadataSizes(rows, 0, rows, tables.size))
    buffers.fill(packed)
    query, key, value = (randoms(rows, count, dim) for count in (kv_heads * group, kv_heads, kv_heads))

    def call() -> None:
        step = kernels.TritonAttention(pool, packed, buffers)
        for site in range(sites):
            step.compute(site, query, key, value, ScoreParams(dim**-0.5))

    return timed(graphed(call)) / sites, rows * context * kv_heads * dim * 2 * DTYPE.itemsize


def decodes(bandwidth: float) -> None:
    """Report attention of rows that decode: write, attend and reduce, of one layer."""
    for (name, heads), (rows, context) in itertools.product(HEADS.items(), DECODES):
        seconds, read = decode_seconds(rows, context, heads)
        share = 100 * read / seconds / bandwidth
        say(
            f"  {name:9s} rows {rows:4d} context {context:5d}: {1e6 * seconds:8.1f} us,"
            f" {read / seconds / 1e9:6.0f} GB/s, {share:5.1f} % of copies"
        )


def decode_cuts() -> None:
    """Compare cuts of the kernel for one query."""
    for blocks, split_tokens in SPLIT_CUTS:
        found = []
        for (name, heads), rows in itertools.product(HEADS.items(), (64, 256)):
            try:
                with cut(split=blocks, split_tokens=split_tokens):
                    seconds, read = decode_seconds(rows, 1024, heads)
                found.append(f"{name} {rows}: {read / seconds / 1e9:5.0f}")
            except Exception as error:  # noqa: BLE001 - a cut may need more than the device has
                found.append(f"{name} {rows}: {type(error).__name__}")
        about = f"keys {blocks.keys:3d} warps {blocks.warps} stages {blocks.stages} split {split_tokens}"
        say(f"  {about}:  " + "   ".join(found), "GB/s")


def prefill_cuts() -> None:
    """Compare cuts of the kernel for tiles of queries."""
    for blocks in TILE_CUTS:
        found = []
        for (name, heads), (count, length) in itertools.product(HEADS.items(), ((16, 1024), (2, 8192))):
            kv_heads, group, dim = heads
            pages = count * length // PAGE_SIZE
            pool = pool_for(
                pages, KVLayout((AttentionLayer(None, kv_heads, dim, dim, MaskKind()),), DTYPE, PAGE_SIZE), 4096
            )
            tokens = torch.zeros(count * length, dtype=torch.int64, device=DEVICE)
            tables = pool.allocate(pages).reshape(count, -1)
            packed = ForwardBatch(tokens, tables, np.zeros(count, np.int64), np.full(count, length))
            query, key, value = (randoms(count * length, n, dim) for n in (kv_heads * group, kv_heads, kv_heads))
            with cut(tiles=blocks):
                step = kernels.TritonBackend(pool)(pool, packed)
                seconds = timed(partial(step.compute, 0, query, key, value, ScoreParams(dim**-0.5)), repeat=5)
            rate = 2 * count * length * length * kv_heads * group * dim / seconds
            found.append(f"{name} {count}x{length}: {rate / 1e12:.0f}")
        say(f"  tiles {blocks.queries}x{blocks.keys} warps {blocks.warps}: " + "   ".join(found), "TFLOP/s")


def multiply(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
    """Multiply one input by each of the weights."""
    for weight in weights:
        F.linear(x, weight)


def products(bandwidth: float) -> None:
    """Compare products of one input that run alone with the same merged, and with the bandwidth."""
    for (name, (hidden, qkv, inter)), rows in itertools.product(PRODUCTS.items(), (4,) if TINY else (16, 64, 256)):
        found = []
        groups = {"qkv": (hidden, qkv), "gate+up": (hidden, (inter, inter)), "o": (hidden, (hidden,))}
        for label, (into, sizes) in {**groups, "down": (inter, (hidden,))}.items():
            # So many that none is in the cache when it comes again.
            copies = 1 if TINY else max(2, min(8, int(120e6 / (sum(sizes) * into * 2)) + 1))
            sets = [[randoms(size, into) for size in sizes] for _ in range(copies)]
            whole = [torch.cat(weights) for weights in sets]
            x = randoms(rows, into)
            alone = timed(graphed(partial(multiply, x, [weight for weights in sets for weight in weights]))) / copies
            merged = timed(graphed(partial(multiply, x, whole))) / copies
            bound = sum(sizes) * into * DTYPE.itemsize / bandwidth
            found.append(f"{label} {1e6 * alone:.1f} / {1e6 * merged:.1f} / {1e6 * bound:.1f}")
        say(f"  {name} rows {rows:3d}, us alone / merged / bound: " + "; ".join(found))


def sampling() -> None:
    """Measure the sampler: plain, top-p and top-k."""
    vocabulary = 999 if TINY else 151_936
    for rows in (4,) if TINY else (64, 256, 1024):
        logits = torch.randn(rows, vocabulary, device=DEVICE).to(torch.bfloat16)
        keys = torch.arange(2 * rows, device=DEVICE).view(rows, 2)
        zeros = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
        one, none = torch.ones(rows, device=DEVICE), torch.zeros(rows, device=DEVICE)
        ways = (
            RowSampling(one, zeros, one, none, keys, zeros, 0, False, False),
            RowSampling(one, zeros, 0.95 * one, none, keys, zeros, 0, True, False),
            RowSampling(one, zeros + 50, one, none, keys, zeros, 50, False, False),
        )
        plain, top_p, top_k = (timed(partial(sample, logits, way, zeros), repeat=8) for way in ways)
        say(
            f"  {rows:4d} x {vocabulary}: plain {1e6 * plain:.0f} us ({logits.nbytes / plain / 1e9:.0f} GB/s of one"
            f" pass), top-p {1e6 * top_p:.0f} us, top-k 50 {1e6 * top_k:.0f} us"
        )


def repeated(call: Callable[[], object], times: int) -> None:
    """Make a call so many times."""
    for _ in range(times):
        call()


def launches() -> None:
    """Measure norms and rotary embeddings, and what a launch costs in a graph and on the host."""
    from rollout.models.patches.pointwise_triton import TritonPointwise

    pointwise = TritonPointwise()
    x = torch.randn(64, 1536, device=DEVICE).bfloat16()
    factors = pointwise.norm_factors(x[0].contiguous(), torch.bfloat16)
    query, key, angles = (torch.randn(64, heads, 128, device=DEVICE).bfloat16() for heads in (12, 2, 1))
    angles = angles[:, 0].contiguous()
    calls: dict[str, Callable[[], object]] = {
        "norm": partial(pointwise.rms_norm, x, factors, 1e-6, False),
        "rotate": partial(pointwise.rotate, query, key, angles, angles),
        "add": lambda: x + x,
        "silu*": lambda: F.silu(x) * x,
    }
    for name, call in calls.items():
        many = timed(graphed(partial(repeated, call, LAUNCHES))) / LAUNCHES
        began = time.perf_counter()
        repeated(call, 200)
        host = (time.perf_counter() - began) / 200
        synchronize()
        say(f"  {name:7s}: {1e6 * many:.2f} us each in a graph of {LAUNCHES}; host {1e6 * host:.1f} us per call")


def row_counts() -> None:
    """Report for which numbers of rows the bits of one row's product stay the same."""
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for name, (out, into) in LINEARS.items():
            weight = torch.randn(out, into, device=DEVICE).to(dtype)
            x = torch.randn(ROW_COUNTS[-1], into, device=DEVICE).to(dtype)
            wanted = F.linear(x[:64], weight)[0]
            same = [rows for rows in ROW_COUNTS if torch.equal(F.linear(x[:rows], weight)[0], wanted)]
            others = [rows for rows in (1, 8, 32, 128, 256, 1024) if rows not in same]
            found.append(f"{name}: {len(same)}/{len(ROW_COUNTS)} {others}")
        say(f"  {str(dtype)[6:]}, same bits as with 64 rows (not with): " + "; ".join(found))


def main() -> None:
    """Measure everything; cuts and launches on a GPU alone."""
    bandwidth = copy_bandwidth(DEVICE)
    say(f"# micro: copies at {bandwidth / 1e9:.0f} GB/s")
    guarded("attention of rows that decode", lambda: decodes(bandwidth))
    if CUDA:
        guarded("cuts for one query", decode_cuts)
        guarded("cuts for tiles of queries", prefill_cuts)
    guarded("products alone and merged", lambda: products(bandwidth))
    guarded("sampling", sampling)
    if CUDA:
        guarded("norm, rotary, and what a launch costs in a graph", launches)
    guarded("bits of a row by the number of rows", row_counts)
    ended()


if __name__ == "__main__":
    main()
