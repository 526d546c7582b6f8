"""Promise 1 with `batch_invariant=True` on a GPU, in the interpreter if there is none: bits, not rounding.

The products of a CPU are batch-invariant anyway, so only what a GPU's attention would do differently is put in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rollout import Engine, Record, SamplingParams
from rollout.batcher.policies.static import StaticPolicy
from rollout.batcher.types import Bounds
from rollout.engine.live_module import LiveModule
from rollout.models.attention import triton, triton_metadata
from rollout.models.attention.triton import TileSizes, TritonAttention, TritonBackend
from rollout.models.errors import UnsupportedModel
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.runners import packed, parity_check
from tests.support.parity import tight_engine
from tests.support.tiny_models import tiny
from tests.support.triton_interpreter import kernels_run_here

PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)
SMALL = TileSizes(16, 16, 4), TileSizes(16, 32, 4)
#: Two that need a fourth page soon, and the shortest.
PROMPTS = [[5, 6] * 23, [9, 10] * 23, [3]]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's attention with short splits, small cuts where there is no GPU, and a batch-invariant GPU's layouts."""
    monkeypatch.setattr(triton_metadata, "SPLIT_TOKENS", 16)
    if kernels_run_here(monkeypatch).type == "cuda":
        return
    monkeypatch.setattr(triton, "_TILE_SIZES", dict.fromkeys(triton._TILE_SIZES, SMALL))
    monkeypatch.setattr(parity_check, "_COMPANY", 1)
    monkeypatch.setattr(parity_check, "_DECODED_LENGTH", 40)
    monkeypatch.setattr(packed, "select_backend", lambda choice, pool: TritonBackend(pool))
    plain = LiveModule._layout_of
    monkeypatch.setattr(
        LiveModule, "_layout_of", lambda self, strategy: replace(plain(self, strategy), decodes_apart=True)
    )


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """In float32, and with attention that weighs much, so that other bits there show in the logits.

    Attention in the first layer decides what the second one keeps of a token.
    """
    model = tiny("llama", num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(8)
            layer.self_attn.o_proj.weight.mul_(8)
    return model


def same(found: Sequence[Record], expected: Sequence[Record]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.completion_ids == other.completion_ids, one.row_id
        assert one.logprobs == other.logprobs, one.row_id
        assert one.sampler_logprobs == other.sampler_logprobs, one.row_id


class Generated:
    """One engine and its samples, made together and with memory for all; the interpreter takes seconds for each."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.engine = Engine(model, None, batch_invariant=True)
        batch = self.engine.generate(PROMPTS, PARAMS, seed=3)
        assert batch.stats.preempted_rows == 0
        self.records = list(batch)


_GENERATED: list[Generated] = []


@pytest.fixture
def generated(model: PreTrainedModel) -> Generated:
    if not _GENERATED:
        _GENERATED.append(Generated(model))
    return _GENERATED[0]


def test_preempted_rows_get_the_bits_of_undisturbed_ones(model: PreTrainedModel, generated: Generated) -> None:
    batch = tight_engine(model, 7, batch_invariant=True).generate(PROMPTS[:2], PARAMS, seed=3)
    assert batch.stats.recomputed_tokens > 46, "with tokens that it had generated"
    same(list(batch), generated.records[:2])


def test_company_and_chunks_of_one_token_change_no_bits(model: PreTrainedModel, generated: Generated) -> None:
    """Prefills of at most 15 tokens a step leave one token of 46 to a step of its own."""
    policy = StaticPolicy(Bounds(max_rows=1, prefill_tokens=15))
    found = Engine(model, None, policy=policy, batch_invariant=True).generate(PROMPTS, PARAMS, seed=3)
    same(list(found), generated.records)


def test_resumed_rows_get_the_bits_of_uninterrupted_ones(generated: Generated) -> None:
    begun = generated.engine.generate(PROMPTS, PARAMS, seed=3, stop_when=lambda progress: progress.steps > 4)
    assert any(record.finish_reason == "abort" and record.completion_ids for record in begun)
    same(list(generated.engine.generate(params=PARAMS, resume=begun)), generated.records)


def test_kept_completions_are_not_taken_for_prompts(generated: Generated) -> None:
    """The next turn of a conversation begins with what was generated, and gets the bits of a prompt."""
    engine = generated.engine
    with engine.session() as session:
        first = session.generate(PROMPTS[:2], PARAMS, seed=3)
        turns = [[*record.prompt_ids, *record.completion_ids, 7, 8] for record in first]
        second = session.generate(turns, PARAMS, seed=4)
        assert second.stats.prefix_hits > 0
    same(list(second), list(engine.generate(turns, PARAMS, seed=4)))


def test_scores_are_those_that_tokens_were_drawn_with(generated: Generated) -> None:
    for score, record in zip(generated.engine.score(generated.records), generated.records, strict=True):
        # The logits are the same; the sampler sums their exponentials in another order.
        assert list(score.logprobs) == pytest.approx(record.logprobs, abs=6e-7)


def test_attention_that_rounds_otherwise_for_several_tokens_is_refused(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(TritonBackend):
        def __call__(self, pool: PagePool, batch: ForwardBatch) -> TritonAttention:
            return super().__call__(pool, replace(batch, decode_lens=np.zeros(0, np.int64)))

    # On a GPU too: in float32 the engine's own sizes add up as many keys at a time for one token as for several.
    monkeypatch.setattr(triton, "_TILE_SIZES", dict.fromkeys(triton._TILE_SIZES, SMALL))
    monkeypatch.setattr(packed, "select_backend", lambda choice, pool: Plain(pool))
    with pytest.raises(UnsupportedModel, match=r"^batch_invariant=true was requested, but .* divided over steps"):
        Engine(model, None, batch_invariant=True)
