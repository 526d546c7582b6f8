"""Compare cuts of the attention kernel, for one query and for tiles of queries.

python -m jobs.gpu.cuts
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from jobs.gpu.common import CUDA, DEVICE, TINY, ended, guarded, say, start, synchronize, timed
from jobs.gpu.micro import DTYPE, HEADS, PAGE_SIZE, decode_seconds, pool_for, randoms
from rollout.models.attention import triton as kernels
from rollout.models.attention import triton_metadata
from rollout.models.attention.interface import ScoreParams
from rollout.models.attention.triton import TileSizes
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind

#: The cut, and tokens of a split; the first is the product's.
SPLIT_CUTS = (
    (TileSizes(16, 64, 4, 5), 256),
    (TileSizes(16, 64, 4, 5), 512),
    (TileSizes(16, 64, 4, 3), 256),
    (TileSizes(16, 64, 2, 3), 256),
    (TileSizes(16, 32, 4, 5), 256),
    (TileSizes(16, 128, 4, 3), 256),
    (TileSizes(16, 128, 8, 5), 512),
)
TILE_CUTS = (TileSizes(64, 32, 4, 5), TileSizes(64, 32, 4), TileSizes(64, 64, 4), TileSizes(128, 64, 8))
#: Rows that decode, and prompts with their lengths
ROWS = (2,) if TINY else (64, 256)
CONTEXT = 40 if TINY else 1024
PREFILLS = ((2, 48),) if TINY else ((16, 1024), (2, 8192))
COMPILERS = 8
"""Processes that compile at the same time."""


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


def prefill_seconds(count: int, length: int, heads: tuple[int, int, int]) -> float:
    """Measure attention of prompts that are prefilled: seconds of one layer."""
    kv_heads, group, dim = heads
    pages = count * length // PAGE_SIZE
    pool = pool_for(pages, KVLayout((AttentionLayer(None, kv_heads, dim, dim, MaskKind()),), DTYPE, PAGE_SIZE), 4096)
    tokens = torch.zeros(count * length, dtype=torch.int64, device=DEVICE)
    tables = pool.allocate(pages).reshape(count, -1)
    packed = ForwardBatch(tokens, tables, np.zeros(count, np.int64), np.full(count, length))
    query, key, value = (randoms(count * length, n, dim) for n in (kv_heads * group, kv_heads, kv_heads))
    step = kernels.TritonBackend(pool)(pool, packed)
    return timed(partial(step.compute, 0, query, key, value, ScoreParams(dim**-0.5)), repeat=5)


def compile_one(index: int) -> None:
    """Compile one cut for one model's heads, by a small launch, into the cache that all processes share."""
    which, heads = list(itertools.product(range(len(SPLIT_CUTS) + len(TILE_CUTS)), HEADS.values()))[index]
    if which < len(SPLIT_CUTS):
        blocks, split_tokens = SPLIT_CUTS[which]
        with cut(split=blocks, split_tokens=split_tokens):
            decode_seconds(2, 64, heads)
    else:
        with cut(tiles=TILE_CUTS[which - len(SPLIT_CUTS)]):
            prefill_seconds(2, 64, heads)
    synchronize()


def compile_all() -> None:
    """Compile all cuts side by side: one after the other they would take a minute."""
    count = len(HEADS) * (len(SPLIT_CUTS) + len(TILE_CUTS))
    workers = min(COMPILERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        failures = [future.exception() for future in [pool.submit(compile_one, index) for index in range(count)]]
    for failure in filter(None, failures):
        say(f"  a cut failed: {type(failure).__name__}: {str(failure)[:120]}")


def decode_cuts() -> None:
    """Compare cuts of the kernel for one query."""
    for blocks, split_tokens in SPLIT_CUTS:
        found = []
        for (name, heads), rows in itertools.product(HEADS.items(), ROWS):
            try:
                with cut(split=blocks, split_tokens=split_tokens):
                    seconds, read = decode_seconds(rows, CONTEXT, heads)
                found.append(f"{name} {rows}: {read / seconds / 1e9:5.0f}")
            except Exception as error:  # noqa: BLE001 - a cut may need more than the device has
                found.append(f"{name} {rows}: {type(error).__name__}")
        about = f"keys {blocks.keys:3d} warps {blocks.warps} stages {blocks.stages} split {split_tokens}"
        say(f"  {about}:  " + "   ".join(found), "GB/s")


def prefill_cuts() -> None:
    """Compare cuts of the kernel for tiles of queries."""
    for blocks in TILE_CUTS:
        found = []
        for (name, heads), (count, length) in itertools.product(HEADS.items(), PREFILLS):
            kv_heads, group, dim = heads
            try:
                with cut(tiles=blocks):
                    seconds = prefill_seconds(count, length, heads)
                rate = 2 * count * length * length * kv_heads * group * dim / seconds
                found.append(f"{name} {count}x{length}: {rate / 1e12:.0f}")
            except Exception as error:  # noqa: BLE001 - a cut may need more than the device has
                found.append(f"{name} {count}x{length}: {type(error).__name__}")
        about = f"tiles {blocks.queries}x{blocks.keys} warps {blocks.warps} stages {blocks.stages}"
        say(f"  {about}: " + "   ".join(found), "TFLOP/s")


def main() -> None:
    """Compile, then measure."""
    start("the first of each kind is the product's")
    if CUDA:
        guarded("compiling", compile_all)
    guarded("cuts for one query", decode_cuts)
    guarded("cuts for tiles of queries", prefill_cuts)
    ended()


if __name__ == "__main__":
    main()
