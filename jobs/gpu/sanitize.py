"""Run every Triton kernel once on small odd shapes, for compute-sanitizer: no model and no cuBLAS.

python -m jobs.gpu.sanitize
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from jobs.gpu.common import DEVICE, TINY, ended, guarded, synchronize
from rollout.models.arrays import ceil_div
from rollout.models.attention.interface import ScoreParams
from rollout.models.attention.triton import TritonBackend
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.patches.pointwise_triton import TritonPointwise
from rollout.models.patches.products_triton import product
from rollout.models.sampling.gumbel_triton import TritonGumbelMax
from rollout.models.sampling.top_p_triton import threshold

LENGTHS = (300, 1, 17, 520, 16)
PAGE_SIZE = 16
#: dtype, KV heads, query heads of each, key dim, value dim, span, softcap, sinks
CASES = (
    (torch.bfloat16, 2, 6, 128, 128, MaskKind(), None, False),
    (torch.bfloat16, 1, 4, 64, 64, MaskKind("window", 40), 30.0, True),
    (torch.float32, 2, 2, 80, 80, MaskKind("chunk", 48), None, False),
    (torch.bfloat16, 1, 1, 192, 128, MaskKind(), None, False),
)


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
        query, key, value = (torch.randn(total, *shape, device=DEVICE).to(dtype) for shape in shapes)
        scores = ScoreParams(key_dim**-0.5, softcap, torch.zeros(heads, device=DEVICE, dtype=dtype) if sinks else None)
        return [step.compute(index, query, key, value, scores) for index in range(2)]

    forward([0] * len(LENGTHS), [max(1, length - 1) for length in LENGTHS])
    found = forward([length - 1 for length in LENGTHS], [1] * len(LENGTHS))
    synchronize()
    assert torch.isfinite(found[0].float()).all()


def others() -> None:
    """Run the kernels of sampling, top-p, norms and rotary embeddings."""
    for dtype, vocabulary in ((torch.bfloat16, 5003), (torch.float32, 255), (torch.bfloat16, 151_936)):
        logits = torch.randn(3, vocabulary, device=DEVICE).to(dtype)
        zeros = torch.zeros(3, dtype=torch.int64, device=DEVICE)
        keys = torch.ones(3, 2, dtype=torch.int64, device=DEVICE)
        temperature = torch.tensor([0.0, 0.7, 1.0], device=DEVICE)
        tokens = TritonGumbelMax().draw(logits, temperature, keys, zeros, zeros)[0]
        synchronize()
        assert int(tokens.max()) < vocabulary
        assert int(tokens[0]) == int(logits[0].float().argmax())
        if vocabulary < 6000:
            wanted = torch.tensor([0.5, 0.99, 1.0], device=DEVICE)
            threshold(logits, temperature, wanted, torch.full_like(wanted, -torch.inf))
    kernels = TritonPointwise()
    hidden = torch.randn(5, 1536, device=DEVICE).bfloat16()
    kernels.rms_norm(hidden, kernels.norm_factors(hidden[0], torch.bfloat16), 1e-6, False)
    kernels.add_norm(hidden, hidden, kernels.norm_factors(hidden[0], torch.bfloat16), 1e-6, False)
    kernels.gated_silu(hidden, hidden)
    product(hidden, hidden.T, hidden[0, :5])
    heads = torch.randn(5, 14, 128, device=DEVICE).bfloat16()
    angles = torch.randn(5, 128, device=DEVICE).bfloat16()
    kernels.rotate(heads[:, :12], heads[:, 12:], angles, angles)
    synchronize()


def main() -> None:
    """Run every case; the first alone where all is tiny."""
    torch.manual_seed(0)
    for case in CASES[: 1 if TINY else None]:
        guarded(f"attention {case[:5]}", partial(attend, *case))
    guarded("sampling, top-p, norms", others)
    ended()


if __name__ == "__main__":
    main()
