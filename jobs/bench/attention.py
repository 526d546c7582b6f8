"""Times paged attention on a CPU: decodes beside a sum of the same bytes, prefills beside the best matrix product.

    python -m jobs.bench.attention --heads 9/3/64 --decode 1x4000,8x1000,64x1000 --prefill 2048

Keys and values are those of as many layers as exceed the caches, in pages that are scattered, and layers take turns as
in a model. Prefills are causal; only what a token sees counts as their work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from jobs.bench.lib import tables
from jobs.bench.products import seconds
from rollout.models.attention.compiled import CompiledForward, kernel
from rollout.models.attention.interface import ScoreParams
from rollout.models.huge_pages import huge_empty
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool

PAGE_SIZE = 16
#: Of SmolLM2-135M, Qwen2.5-0.5B and Llama-3.1-8B: query heads, key heads, and the numbers of a head.
HEADS = "9/3/64,14/2/64,32/8/128"
SQUARE = 2048
HEADER = ("heads", "queries", "context", "us a layer", "bound us", "bound / us", "GB/s", "GFLOP/s")


class World:
    """Sequences of one length whose pages are scattered over a pool."""

    def __init__(self, heads: str, sequences: int, context: int, dtype: torch.dtype, cold_bytes: float) -> None:
        self.query_heads, kv_heads, dim = map(int, heads.split("/"))
        width = -(-context // PAGE_SIZE)
        self.bytes = sequences * context * kv_heads * dim * 2 * dtype.itemsize
        layers = max(1, round(cold_bytes / self.bytes))
        layer = AttentionLayer(nn.Identity(), kv_heads, dim, dim, MaskKind())
        layout = KVLayout((layer,) * layers, dtype, PAGE_SIZE)
        self.pool = PagePool(layout, width * sequences, torch.device("cpu"))
        self.pool.grow()
        for slab in self.pool.slabs:
            assert slab is not None
            for tensor in slab.tensors:
                tensor.normal_()
        pages = np.random.default_rng(0).permutation(width * sequences)
        self.tables = pages.reshape(sequences, width)
        self.layers, self.dtype, self.dim, self.kv_heads = layers, dtype, dim, kv_heads

    def call(self, context: int, queries: int) -> Callable[[], object]:
        """Return what attends in all layers: each sequence has ``context`` tokens, of which ``queries`` are new."""
        compiled = kernel()
        assert compiled is not None
        sequences = len(self.tables)
        lengths = np.full(sequences, queries)
        forward = CompiledForward(compiled, self.pool, self.tables, np.full(sequences, context) - lengths, lengths)
        query, key, value = (
            torch.randn(sequences * queries, heads, self.dim).to(self.dtype)
            for heads in (self.query_heads, self.kv_heads, self.kv_heads)
        )
        scores = ScoreParams(self.dim**-0.5)
        return lambda: [forward(index, query, key, value, scores) for index in range(self.layers)]


def decode_line(heads: str, sequences: int, context: int, dtype: torch.dtype, given: argparse.Namespace) -> list[str]:
    """Compare one new token of each sequence with a sum over as many bytes as their keys and values."""
    world = World(heads, sequences, context, dtype, given.cold_bytes)
    numbers = huge_empty(world.bytes * world.layers).zero_().view(torch.float32)
    taken, bound = (t / world.layers for t in seconds([world.call(context, 1), lambda: numbers.sum()], given.budget))
    work = 4 * sequences * context * world.query_heads * world.dim
    return _line(heads, f"{sequences} x 1", context, taken, bound, world.bytes, work)


def prefill_line(heads: str, context: int, dtype: torch.dtype, given: argparse.Namespace) -> list[str]:
    """Compare a whole prompt with as much arithmetic at the rate of a square product by torch."""
    world = World(heads, 1, context, dtype, 1)
    square = [torch.randn(SQUARE, SQUARE).to(dtype) for _ in range(2)]
    taken, product = seconds([world.call(context, context), lambda: square[0] @ square[1]], given.budget)
    work = 2 * context * (context + 1) * world.query_heads * world.dim
    return _line(heads, f"1 x {context}", context, taken, work * product / (2 * SQUARE**3), world.bytes, work)


def _line(heads: str, queries: str, context: int, taken: float, bound: float, size: int, work: int) -> list[str]:
    times = (f"{taken * 1e6:.0f}", f"{bound * 1e6:.0f}", f"{bound / taken:.2f}")
    return [heads, queries, str(context), *times, f"{size / taken / 1e9:.1f}", f"{work / taken / 1e9:.0f}"]


def main() -> None:
    """Print a line per shape of heads and per case."""
    parser = argparse.ArgumentParser(description="Times paged attention on a CPU.")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--heads", default=HEADS, help="QUERY/KEY/NUMBERS OF A HEAD, with commas between")
    parser.add_argument("--decode", default="1x4000,8x1000,64x1000", help="SEQUENCESxTOKENS, with commas between")
    parser.add_argument("--prefill", default="256,2048", help="tokens, with commas between")
    parser.add_argument("--cold-bytes", type=float, default=4e8, help="bytes of all layers' keys and values")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each line")
    given = parser.parse_args()
    dtype, lines = getattr(torch, given.dtype), []
    with torch.inference_mode():
        for heads in given.heads.split(","):
            for case in filter(None, given.decode.split(",")):
                sequences, tokens = map(int, case.split("x"))
                lines.append(decode_line(heads, sequences, tokens, dtype, given))
            for case in filter(None, given.prefill.split(",")):
                lines.append(prefill_line(heads, int(case), dtype, given))
    print(tables.render([HEADER, *lines]))


if __name__ == "__main__":
    main()
