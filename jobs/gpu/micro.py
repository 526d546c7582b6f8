"""Measure kernels alone: attention, sampling, norms, matrix products alone and merged, bits by rows.

python -m jobs.gpu.micro
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from jobs.bench.decode_bandwidth import copy_bandwidth
from jobs.gpu.common import CUDA, DEVICE, TINY, ended, graphed, guarded, say, start, synchronize, timed
from rollout.models.arrays import ceil_div
from rollout.models.attention import triton as kernels
from rollout.models.attention.interface import ScoreParams
from rollout.models.attention.triton_metadata import MetadataSizes
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.patches.pointwise_triton import TritonPointwise
from rollout.models.patches.products_triton import grouped_product, product
from rollout.models.sampling.sampler import RowSampling, sample

DTYPE = torch.bfloat16 if CUDA else torch.float32
PAGE_SIZE = 16
#: KV heads, query heads of each, head size
HEADS = {"tiny": (1, 2, 16)} if TINY else {"qwen1.5b": (2, 6, 128), "llama8b": (8, 4, 128)}
#: Rows, tokens of each
DECODES = ((3, 40),) if TINY else ((64, 1024), (256, 1024), (16, 8192), (1, 32768), (1024, 512))
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
#: Launches of one graph, and calls that the host is timed over
LAUNCHES, CALLS = (2, 2) if TINY else (64, 200)
ROW_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)


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
    angles = randoms(rows, dim), randoms(rows, dim)

    def call() -> None:
        step = kernels.TritonAttention(pool, packed, buffers)
        for site in range(sites):
            step.compute_rotating(site, query, key, value, angles, ScoreParams(dim**-0.5))

    return timed(graphed(call)) / sites, rows * context * kv_heads * dim * 2 * DTYPE.itemsize


def decodes(bandwidth: float) -> None:
    """Report attention of rows that decode: rotate and write, attend and reduce, of one layer."""
    for (name, heads), (rows, context) in itertools.product(HEADS.items(), DECODES):
        seconds, read = decode_seconds(rows, context, heads)
        share = 100 * read / seconds / bandwidth
        say(
            f"  {name:9s} rows {rows:4d} context {context:5d}: {1e6 * seconds:8.1f} us,"
            f" {read / seconds / 1e9:6.0f} GB/s, {share:5.1f} % of copies"
        )


def multiply(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
    """Multiply one input by each of the weights."""
    for weight in weights:
        F.linear(x, weight)


def multiply_invariantly(x: torch.Tensor, sets: Sequence[list[torch.Tensor]]) -> None:
    """Multiply one input by each set of weights, as with ``batch_invariant``."""
    for weights in sets:
        if len(weights) == 1:
            product(x, weights[0].T)
        else:
            assert grouped_product(x, weights, [None] * len(weights)) is not None


def products(bandwidth: float) -> None:
    """Compare products of one input that run alone with merged and batch-invariant ones, and with the bandwidth."""
    for (name, (hidden, qkv, inter)), rows in itertools.product(PRODUCTS.items(), (4,) if TINY else (16, 64, 256)):
        found = []
        groups = {"qkv": (hidden, qkv), "gate+up": (hidden, (inter, inter)), "o": (hidden, (hidden,))}
        for label, (into, sizes) in {**groups, "down": (inter, (hidden,))}.items():
            # So many that none is in the cache when it comes again.
            copies = 1 if TINY else max(2, min(8, int(120e6 / (sum(sizes) * into * 2)) + 1))
            sets = [[randoms(size, into) for size in sizes] for _ in range(copies)]
            x = randoms(rows, into)
            calls: tuple[Callable[[], object], ...] = (
                partial(multiply, x, [weight for weights in sets for weight in weights]),
                partial(multiply, x, [torch.cat(weights) for weights in sets]),
                partial(multiply_invariantly, x, sets),
            )
            times = [1e6 * timed(graphed(call)) / copies for call in calls]
            times.append(1e6 * sum(sizes) * into * DTYPE.itemsize / bandwidth)
            found.append(f"{label} {' / '.join(f'{us:.1f}' for us in times)}")
        say(f"  {name} rows {rows:3d}, us alone / merged / invariant / bound: " + "; ".join(found))


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
    """Measure what stands between products, and what a launch costs in a graph and on the host."""
    pointwise = TritonPointwise()
    rows, width, inter = (2, 64, 96) if TINY else (64, 1536, 8960)
    x = torch.randn(rows, width, device=DEVICE).bfloat16()
    gate = torch.randn(rows, inter, device=DEVICE).bfloat16()
    factors = pointwise.norm_factors(x[0].contiguous(), torch.bfloat16)
    query, key, angles = (torch.randn(rows, heads, 128, device=DEVICE).bfloat16() for heads in (12, 2, 1))
    angles = angles[:, 0].contiguous()
    calls: dict[str, Callable[[], object]] = {
        "norm": partial(pointwise.rms_norm, x, factors, 1e-6, False),
        "add_norm": partial(pointwise.add_norm, x, x, factors, 1e-6, False),
        "gated_silu": partial(pointwise.gated_silu, gate, gate),
        "rotate": partial(pointwise.rotate, query, key, angles, angles),
        "torch add": lambda: x + x,
    }
    found = []
    for name, call in calls.items():
        many = timed(graphed(partial(repeated, call, LAUNCHES))) / LAUNCHES
        began = time.perf_counter()
        repeated(call, CALLS)
        host = (time.perf_counter() - began) / CALLS
        synchronize()
        found.append(f"{name} {1e6 * many:.2f} / {1e6 * host:.1f}")
    say(f"  launches at {rows} rows, us in a graph / host: " + "; ".join(found))


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
    """Measure in the order of value."""
    bandwidth = copy_bandwidth(DEVICE)
    start(f"copies at {bandwidth / 1e9:.0f} GB/s")
    guarded("attention of rows that decode", lambda: decodes(bandwidth))
    guarded("sampling", sampling)
    guarded("launches", launches)
    guarded("products", lambda: products(bandwidth))
    guarded("bits of a row by the number of rows", row_counts)
    ended()


if __name__ == "__main__":
    main()
