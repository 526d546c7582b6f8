"""Promise 6: after a call the module is as before, and no KV bytes are held."""

from __future__ import annotations

import gc
import random
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rollout import Engine, SamplingParams
from tests.support.devices import DEVICE, GPU
from tests.support.parity import random_prompts, worst_logprob
from tests.support.tiny_models import tiny

_PARAMS = SamplingParams(n=2, max_new_tokens=12)


def _state(model: nn.Module) -> dict[str, Any]:
    """All that a trainer could notice."""
    return {
        "training": [module.training for module in model.modules()],
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "attention": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "parameters": [(n, p.dtype, p.requires_grad, p.data_ptr(), p._version) for n, p in model.named_parameters()],
        "buffers": [(n, b.dtype, b.sum().item(), b.is_inference()) for n, b in model.named_buffers()],
        "instance attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "torch rng": torch.get_rng_state().tolist(),
        "device rng": torch.cuda.get_rng_state(DEVICE).tolist() if GPU is not None else None,
        "numpy rng": str(np.random.get_state()),
        "python rng": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled(DEVICE.type),
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_is_as_before(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype=dtype)
    model.train()
    model.gradient_checkpointing_enable()
    model.model.layers[1].eval()  # a trainer may have set flags one by one
    model.model.layers[0].requires_grad_(False)
    model.model.layers[2].register_forward_hook(lambda *_: None)
    before = _state(model)
    engine = Engine(model, None)
    assert _state(model) == before
    engine.generate(random_prompts(1, 5), _PARAMS)
    assert _state(model) == before


def test_module_is_its_owners_between_records() -> None:
    model = tiny("llama")
    model.train()
    before = _state(model)
    ids = torch.tensor([[5, 6, 7, 8]], device=DEVICE)
    engine = Engine(model, None)
    for _ in engine.stream(random_prompts(2, 6), _PARAMS):
        assert _state(model) == before
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()  # a step of training between two records
    assert engine.stats is not None
    assert engine.stats.samples == 12


def test_module_is_as_before_when_a_stream_is_left_or_fails() -> None:
    model = tiny("llama")
    before = _state(model)
    engine = Engine(model, None)
    stream = engine.stream(random_prompts(2, 6), _PARAMS)
    next(stream)
    stream.close()
    assert _state(model) == before
    assert engine.stats is not None
    assert engine.stats.kv_bytes_held == 0

    model.lm_head.register_forward_pre_hook(_raise)
    before = _state(model)
    with pytest.raises(ZeroDivisionError):
        engine.generate(random_prompts(2, 2), _PARAMS)
    assert _state(model) == before


def _raise(*_: object) -> None:
    raise ZeroDivisionError


def test_gradients_are_the_same_with_a_rollout_between_steps() -> None:
    def gradients(with_rollout: bool) -> list[torch.Tensor]:
        model = tiny("gemma2")
        model.train()
        ids = torch.tensor([[5, 6, 7, 8, 9, 10]], device=DEVICE)
        model(input_ids=ids, labels=ids).loss.backward()
        if with_rollout:
            Engine(model, None).generate(random_prompts(1, 4), _PARAMS)
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(one, other)


def test_no_kv_bytes_are_held_and_the_cap_is_kept() -> None:
    model = tiny("llama")
    cap = 300_000
    engine = Engine(model, None, max_kv_bytes=cap)
    gc.collect()
    before = _tensor_bytes()
    batch = engine.generate(random_prompts(3, 12), SamplingParams(n=3, max_new_tokens=40))
    assert 0 < batch.stats.peak_kv_bytes <= cap
    assert batch.stats.kv_bytes_held == 0
    gc.collect()
    assert _tensor_bytes() == before


def _tensor_bytes() -> int:
    """Bytes of all storages that tensors hold."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) in (torch.Tensor, nn.Parameter)
    }
    return sum(storages.values())


def test_new_weights_are_used_at_once_and_stamped() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama", dtype=dtype)
        engine = Engine(model, None)
        prompts = random_prompts(4, 3)
        old = engine.generate(prompts, _PARAMS)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(-1)
        engine.weight_version = 1
        new = engine.generate(prompts, _PARAMS)
        fresh = Engine(model, None).generate(prompts, _PARAMS)
        assert [r.completion_ids for r in new] == [r.completion_ids for r in fresh]
        assert [r.completion_ids for r in new] != [r.completion_ids for r in old]
        assert {r.weight_version for r in old} == {0}
        assert {r.weight_version for r in new} == {1}


def test_peft_module_without_merging() -> None:
    model = tiny("llama")
    plain = [r.completion_ids for r in Engine(model, None).generate(random_prompts(5, 4), _PARAMS)]
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    wrapped.train()
    before = _state(wrapped)
    batch = Engine(wrapped, None).generate(random_prompts(5, 4), _PARAMS)
    assert _state(wrapped) == before
    assert [r.completion_ids for r in batch] != plain
    wrapped.eval()
    assert worst_logprob(wrapped, list(batch)) < 1e-5


def test_ambient_autocast_stays_in_force() -> None:
    model = tiny("llama")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        before = _state(model)
        batch = Engine(model, None).generate(random_prompts(6, 4), _PARAMS)
        assert _state(model) == before
        # fp32 numbers would be within 1e-5 of an fp32 forward; these are bf16's
        assert worst_logprob(model, list(batch)) < 0.5
    assert worst_logprob(model, list(batch)) > 1e-5


def test_ambient_inference_mode_changes_nothing() -> None:
    """Its tensors do not count changes in place."""
    for family in ("llama", "bloom", "mamba"):
        model = tiny(family)
        wanted = Engine(model, None).generate(random_prompts(7, 4), _PARAMS)
        with torch.inference_mode():
            batch = Engine(model, None).generate(random_prompts(7, 4), _PARAMS)
        assert [r.completion_ids for r in batch] == [r.completion_ids for r in wanted]
        assert [r.logprobs for r in batch] == [r.logprobs for r in wanted]
