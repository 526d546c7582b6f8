"""Every faster attention against the gathering one, family by family: windows, chunks, softcap, sinks, odd heads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rollout.models.attention import triton
from rollout.models.attention.base import AttentionBackend
from rollout.models.attention.gather import GatherAttention
from rollout.models.attention.select import fastest_backend
from rollout.models.attention.triton import TileSizes, TritonBackend
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.runners.packed import PackedRunner, PackedStrategy
from tests.support.devices import DEVICE, GPU
from tests.support.tiny_models import PACKED, VOCABULARY, shallow
from tests.support.triton_interpreter import kernels_run_here

#: Relative to the logits' size. In half precision the two round weights and values at other places.
_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.06}
#: Forwards of (sequence, start, end): a packed prefill, one that goes on, and mixes with rows that decode.
_FORWARDS = (
    ((0, 0, 40), (1, 0, 5), (2, 0, 1)),
    ((0, 40, 41), (1, 5, 37), (2, 1, 2), (3, 0, 17)),
    ((3, 17, 18), (2, 2, 3), (0, 41, 42), (1, 37, 38)),
)
#: Tiles that the interpreter is quick about.
_BLOCKS = TileSizes(16, 16, 4)


def logits_of(model: PreTrainedModel, steps_for: Callable[[PagePool], AttentionBackend]) -> torch.Tensor:
    """Of all forwards."""
    strategy = PackedStrategy(model)
    layout = strategy.kv_layout()
    pool = PagePool(layout, 3, DEVICE)
    for _ in range(4):
        pool.grow()
    rng = np.random.default_rng(5)
    tokens = torch.from_numpy(rng.integers(3, VOCABULARY, (4, 48))).to(DEVICE)
    tables = rng.permutation(pool.free_pages).reshape(4, 3)
    runner = PackedRunner(model, pool, steps_for(pool))
    logits = []
    with strategy.borrow():
        for parts in _FORWARDS:
            logits.append(
                runner.forward(
                    ForwardBatch(
                        tokens=torch.cat([tokens[sequence, start:end] for sequence, start, end in parts]),
                        page_tables=np.stack([tables[sequence] for sequence, _, _ in parts]),
                        prefix_lens=np.array([start for _, start, _ in parts]),
                        query_lens=np.array([end - start for _, start, end in parts]),
                    )
                )
            )
    return torch.cat(logits).float()


def assert_agrees_with_gathering(family: str, steps_for: Callable[[PagePool], AttentionBackend]) -> None:
    for dtype, tolerance in _TOLERANCE.items():
        model = shallow(family, dtype)
        gathered, found = logits_of(model, lambda _: GatherAttention), logits_of(model, steps_for)
        distance = (found - gathered).norm(dim=-1) / gathered.norm(dim=-1)
        # Rounding can send a token of a mixture of experts elsewhere, so in half precision most rows count.
        worst = distance.max() if dtype == torch.float32 else distance.median()
        assert worst < tolerance, (dtype, distance)


@pytest.mark.parametrize("family", PACKED)
def test_the_fastest_attention_agrees_with_the_gathering_one(family: str) -> None:
    def steps_for(pool: PagePool) -> AttentionBackend:
        steps = fastest_backend(pool)
        if steps is GatherAttention:
            assert GPU is None, "a GPU gathers only where Triton fails"
            pytest.skip("there is no compiler on this machine")
        return steps

    assert_agrees_with_gathering(family, steps_for)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_triton_s_attention_agrees_with_the_gathering_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU as well: a window with a softcap, and sinks."""
    kernels_run_here(monkeypatch)
    monkeypatch.setattr(triton, "_TILE_SIZES", dict.fromkeys(triton._TILE_SIZES, (_BLOCKS, _BLOCKS)))
    assert_agrees_with_gathering(family, TritonBackend)
