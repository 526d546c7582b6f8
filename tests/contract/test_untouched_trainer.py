"""Promise 6: after a call the module is as before, and no KV bytes are held."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rollout import Engine, SamplingParams
from rollout.batcher.types import Decision, Observation
from tests.support.devices import DEVICE
from tests.support.module_state import module_state
from tests.support.parity import random_prompts, worst_logprob
from tests.support.tiny_models import tiny

_PARAMS = SamplingParams(n=2, max_new_tokens=12)


@pytest.mark.parametrize("checkpointing", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_is_as_before(dtype: torch.dtype, checkpointing: str) -> None:
    model = tiny("llama", dtype=dtype)
    model.train()
    getattr(model, checkpointing, model.gradient_checkpointing_enable)()
    model.model.layers[1].eval()  # a trainer may have set flags one by one
    model.model.layers[0].requires_grad_(False)
    model.model.layers[2].register_forward_hook(lambda *_: None)
    before = module_state(model)
    engine = Engine(model, None)
    assert module_state(model) == before
    engine.generate(random_prompts(1, 5), _PARAMS)
    assert module_state(model) == before


def test_module_is_its_owners_between_records() -> None:
    model = tiny("llama")
    model.train()
    before = module_state(model)
    ids = torch.tensor([[5, 6, 7, 8]], device=DEVICE)
    engine = Engine(model, None)
    for _ in engine.stream(random_prompts(2, 6), _PARAMS):
        assert module_state(model) == before
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()  # a step of training between two records
        before = module_state(model)
    assert engine.stats is not None
    assert engine.stats.samples == 12


@pytest.mark.parametrize("collected", [False, True], ids=["closed", "collected"])
def test_module_is_as_before_when_a_stream_is_left(collected: bool) -> None:
    model = tiny("llama")
    before = module_state(model)
    engine = Engine(model, None)
    stream = engine.stream(random_prompts(2, 6), _PARAMS)
    next(stream)
    if collected:
        del stream
        gc.collect()
    else:
        stream.close()  # type: ignore[attr-defined]
    assert module_state(model) == before
    assert engine.stats is not None
    assert engine.stats.kv_bytes_held == 0


@pytest.mark.parametrize("part", ["lm_head", "model.layers.2.mlp", "model.rotary_emb", "model.embed_tokens"])
def test_module_is_as_before_when_its_forward_fails(part: str) -> None:
    model = tiny("llama")
    model.train()
    prompts = random_prompts(2, 2)
    engine = Engine(model, None)
    wanted = [r.completion_ids for r in engine.generate(prompts, _PARAMS)]
    # In the probe, in a prefill after the check's two references and three steps, and in a decode.
    for nth in (1, 7, 9):
        calls = iter(range(1, 1000))

        def fail(*_: object, nth: int = nth, calls: Iterator[int] = calls) -> None:
            if next(calls) == nth:
                _fail()

        hook = model.get_submodule(part).register_forward_pre_hook(fail)
        before = module_state(model)
        with pytest.raises(ZeroDivisionError):
            engine.generate(prompts, _PARAMS)
        assert module_state(model) == before
        hook.remove()
        assert [r.completion_ids for r in engine.generate(prompts, _PARAMS)] == wanted


def test_module_is_as_before_when_a_policy_fails() -> None:
    class Failing:
        """Fails in its fifth decision."""

        decisions = 0

        def decide(self, observation: Observation) -> Decision:
            self.decisions += 1
            return _fail() if self.decisions == 5 else Decision(observation.live_rows + 2, 512, "test")

    model = tiny("llama")
    model.train()
    before = module_state(model)
    engine = Engine(model, None, policy=Failing())
    with pytest.raises(ZeroDivisionError):
        engine.generate(random_prompts(2, 4), _PARAMS)
    assert module_state(model) == before
    assert engine.stats is not None
    assert engine.stats.kv_bytes_held == 0


def _fail() -> NoReturn:
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
    engine.release()
    gc.collect()
    before = _tensor_bytes()
    batch = engine.generate(random_prompts(3, 12), SamplingParams(n=3, max_new_tokens=40))
    assert 0 < batch.stats.peak_kv_bytes <= cap
    assert batch.stats.kv_bytes_held == 0
    engine.release()  # copies of weights stay for the next call, unless memory is short
    gc.collect()
    assert _tensor_bytes() == before


def _stream_and_leave(engine: Engine) -> None:
    next(engine.stream([[5, 6], [7, 8, 9]], _PARAMS))


def _fail_in_a_step(engine: Engine) -> None:
    hook = engine.model.model.norm.register_forward_pre_hook(lambda *_: _fail())  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError):
        engine.generate([[5, 6]], _PARAMS)
    hook.remove()


@pytest.mark.parametrize(
    "use",
    [
        lambda engine: engine.generate([[5, 6]], _PARAMS),
        lambda engine: engine.generate([[5, 6]], _PARAMS, exact=True),
        lambda engine: engine.session().generate([[5, 6]], _PARAMS),
        lambda engine: engine.score([[5, 6]], [[7, 8]]),
        _stream_and_leave,
        _fail_in_a_step,
    ],
    ids=["generate", "exact", "session", "score", "stream", "failed"],
)
def test_engine_that_is_deleted_frees_its_copies_at_once(use: Callable[[Engine], object]) -> None:
    """Not only when Python collects cycles, which it may do long after a GPU ran out of memory."""
    model = tiny("llama", num_hidden_layers=2)
    use(Engine(model, None))
    gc.collect()
    gc.disable()
    try:
        before = _tensor_bytes()
        engine = Engine(model, None)
        use(engine)
        held = weakref.ref(engine._module)
        del engine
        assert held() is None
        assert _tensor_bytes() == before
    finally:
        gc.enable()


def _tensor_bytes() -> int:
    """Bytes of all storages that tensors hold."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        # oneDNN's tensors, which another test may have left, have no storage.
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
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
    before = module_state(wrapped)
    batch = Engine(wrapped, None).generate(random_prompts(5, 4), _PARAMS)
    assert module_state(wrapped) == before
    assert [r.completion_ids for r in batch] != plain
    wrapped.eval()
    assert worst_logprob(wrapped, list(batch)) < 1e-5


def test_ambient_autocast_stays_in_force() -> None:
    model = tiny("llama")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        before = module_state(model)
        batch = Engine(model, None).generate(random_prompts(6, 4), _PARAMS)
        assert module_state(model) == before
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
