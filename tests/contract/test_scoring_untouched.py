"""Scoring borrows the module as generation does: nothing of it changes, and its weights are those of the moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rollout import Engine
from tests.contract.test_scoring import plain, score, some_pairs, worst
from tests.support.devices import DEVICE
from tests.support.module_state import module_state
from tests.support.tiny_models import tiny

_PAIRS = some_pairs(((5, 9), (40, 3), (1, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_is_as_before(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype=dtype)
    model.train()
    model.gradient_checkpointing_enable()
    model.model.layers[1].eval()
    engine = Engine(model, None)
    before = module_state(model)
    scores = score(engine, _PAIRS)
    assert module_state(model) == before
    assert scores.stats.kv_bytes_held == 0 < scores.stats.peak_kv_bytes


def test_module_is_as_before_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    model.train()
    engine = Engine(model, None)
    before = module_state(model)

    def failing(*_: Any) -> None:
        raise RuntimeError("broken")

    hook = model.lm_head.register_forward_pre_hook(failing)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="broken"):
        score(engine, _PAIRS)
    hook.remove()
    assert module_state(model) == before


def test_weights_are_those_of_the_call() -> None:
    model = tiny("llama")
    engine = Engine(model, None)
    first = score(engine, _PAIRS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    second = score(engine, _PAIRS)
    assert worst(model, _PAIRS, second) < 1e-5
    assert first.logprobs != second.logprobs


def test_the_disabled_adapter_of_a_lora_trainer_gives_its_reference_policy() -> None:
    base = tiny("llama")
    reference = [plain(base, *pair).tolist() for pair in _PAIRS]
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    engine = Engine(model, None)
    with model.disable_adapter():
        without = score(engine, _PAIRS)
    trained = score(engine, _PAIRS)
    assert worst(model, _PAIRS, trained) < 1e-5
    for found, expected, adapted in zip(without, reference, trained, strict=True):
        assert found.logprobs == pytest.approx(expected, abs=1e-5)
        assert found.logprobs != pytest.approx(adapted.logprobs, abs=1e-2)


def test_autocast_of_the_caller_is_in_force() -> None:
    model = tiny("llama")
    engine = Engine(model, None)
    exact = score(engine, _PAIRS)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        rounded = score(engine, _PAIRS)
        expected = [plain(model, *pair).tolist() for pair in _PAIRS]
    assert rounded.logprobs != exact.logprobs
    for found, own in zip(rounded, expected, strict=True):
        assert found.logprobs == pytest.approx(own, abs=0.3)
