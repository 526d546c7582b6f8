"""Run every Triton kernel on small odd shapes, for compute-sanitizer: no model and no cuBLAS.

python -m jobs.gpu.sanitize
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.jit import KernelInterface

from jobs.gpu.common import DEVICE, TINY, ended, guarded, say, start, synchronize
from jobs.gpu.resources import cases
from rollout.models.arrays import ceil_div
from rollout.models.attention.interface import ScoreParams
from rollout.models.attention.triton import TritonBackend
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.patches.pointwise_triton import TritonPointwise
from rollout.models.patches.products_triton import grouped_product, product
from rollout.models.sampling.gumbel_triton import TritonGumbelMax
from rollout.models.sampling.top_p_triton import threshold

LENGTHS = (20, 1) if TINY else (300, 1, 17, 520, 16)
#: Dtype of logits, vocabulary
LOGITS = (
    ((torch.bfloat16, 700), (torch.float32, 255))
    if TINY
    else ((torch.bfloat16, 5003), (torch.float32, 255), (torch.float16, 3001), (torch.bfloat16, 151_936))
)
PAGE_SIZE = 16
#: dtype, KV heads, query heads of each, key dim, value dim, span, softcap, sinks
CASES = (
    (torch.bfloat16, 2, 6, 128, 128, MaskKind(), None, False),
    (torch.bfloat16, 1, 4, 64, 64, MaskKind("window", 40), 30.0, True),
    (torch.float32, 2, 2, 80, 80, MaskKind("chunk", 48), None, False),
    (torch.bfloat16, 1, 1, 192, 128, MaskKind(), None, False),
)


@contextmanager
def launches() -> Iterator[set[str]]:
    """Collect the names of the kernels that are launched inside the block."""
    names, own = set[str](), KernelInterface.__getitem__

    def noted(kernel: Any, grid: Any) -> Any:
        names.add(kernel.fn.__name__)
        return own(kernel, grid)

    with mock.patch.object(KernelInterface, "__getitem__", noted):
        yield names


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Draw on the CPU, so that few kernels of torch run."""
    return torch.randn(*shape).to(dtype).to(DEVICE)


def attend(
    dtype: torch.dtype,
    kv_heads: int,
    group: int,
    key_dim: int,
    value_dim: int,
    span: MaskKind,
    softcap: float | None,
    sinks: bool,
) -> None:
    """Prefill sequences of mixed lengths over a pool with holes, then decode one token of each."""
    site = AttentionLayer(None, kv_heads, key_dim, value_dim, span)
    pool = PagePool(KVLayout((site, site), dtype, PAGE_SIZE), 7, DEVICE)
    for _ in range(14):
        pool.grow()
    # Drops an empty slab, so that page ids have a hole.
    pool.shrink([])
    tables = np.zeros((len(LENGTHS), 33), np.int64)
    for row, length in enumerate(LENGTHS):
        pages = ceil_div(length, PAGE_SIZE)
        tables[row, :pages] = pool.allocate(pages)
    steps = TritonBackend(pool)
    heads = kv_heads * group

    def forward(starts: list[int], counts: list[int]) -> list[torch.Tensor]:
        total = sum(counts)
        tokens = torch.zeros(total, dtype=torch.int64, device=DEVICE)
        step = steps(pool, ForwardBatch(tokens, tables, np.array(starts), np.array(counts)))
        shapes = ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
        query, key, value = (numbers(total, *shape, dtype=dtype) for shape in shapes)
        angles = numbers(total, key_dim, dtype=dtype), numbers(total, key_dim, dtype=dtype)
        scores = ScoreParams(key_dim**-0.5, softcap, numbers(heads, dtype=dtype) if sinks else None)
        return [
            step.compute(0, query, key, value, scores),
            step.compute_rotating(1, query, key, value, angles, scores),
        ]

    forward([0] * len(LENGTHS), [max(1, length - 1) for length in LENGTHS])
    found = forward([length - 1 for length in LENGTHS], [1] * len(LENGTHS))
    synchronize()
    assert all(torch.isfinite(out.cpu()).all() for out in found)


def sampling(dtype: torch.dtype, vocabulary: int) -> None:
    """Draw tokens, and find the thresholds of top-p."""
    logits = numbers(3, vocabulary, dtype=dtype)
    zeros = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    keys = torch.ones(3, 2, dtype=torch.int64, device=DEVICE)
    temperature, top_p = (torch.tensor(values, device=DEVICE) for values in ((0.0, 0.7, 1.0), (0.5, 0.99, 1.0)))
    floors = torch.full_like(top_p, -torch.inf)
    thresholds = threshold(logits, temperature, top_p, floors)
    for filters in (None, thresholds):
        tokens = TritonGumbelMax().draw(logits, temperature, keys, zeros, zeros, filters)[0].cpu()
        assert int(tokens.max()) < vocabulary
        assert int(tokens[0]) == int(logits[0].cpu().float().argmax())
    assert thresholds.cpu()[2] == -torch.inf


def products() -> None:
    """Multiply, alone and several layers at once, with edges in every dimension."""
    for dtype in (torch.bfloat16, torch.float32):
        x, weights = numbers(5, 200, dtype=dtype), [numbers(columns, 200, dtype=dtype) for columns in (75, 33, 33)]
        biases: list[torch.Tensor | None] = [numbers(len(weight), dtype=dtype) for weight in weights]
        outs = grouped_product(x, weights, biases)
        assert outs is not None
        for out, weight, bias in zip(outs, weights, biases, strict=True):
            assert torch.equal(out.cpu(), product(x, weight.T, bias).cpu())
        product(x.T, numbers(5, 70, dtype=dtype))


def pointwise() -> None:
    """Norm, add, rotate and activate."""
    kernels = TritonPointwise()
    for dtype in (torch.bfloat16, torch.float32):
        hidden = numbers(5, 1000, dtype=dtype)
        factors = kernels.norm_factors(hidden[0], dtype)
        kernels.rms_norm(hidden, factors, 1e-6, False)
        kernels.add_norm(hidden, hidden, factors, 1e-6, False)
        kernels.gated_silu(hidden, hidden)
        heads, angles = numbers(5, 14, 80, dtype=dtype), numbers(5, 80, dtype=dtype)
        kernels.rotate(heads[:, :12], heads[:, 12:], angles, angles)
    synchronize()


def main() -> None:
    """Run every kernel; of attention the first case alone where all is tiny."""
    start("small odd shapes")
    torch.manual_seed(0)
    with launches() as launched:
        guarded("products", products)
        guarded("norms, rotation, activation", pointwise)
        for case in CASES[: 1 if TINY else None]:
            guarded(f"attention {case[:5]}", partial(attend, *case))
        for dtype, vocabulary in LOGITS:
            guarded(f"sampling {dtype}, {vocabulary}", partial(sampling, dtype, vocabulary))
    missing = {case.kernel for case in cases()} - launched
    say(f"  {len(launched)} kernels launched: {' '.join(sorted(launched))}")
    if missing:
        say(f"  FAIL not launched: {' '.join(sorted(missing))}")
    ended()


if __name__ == "__main__":
    main()
