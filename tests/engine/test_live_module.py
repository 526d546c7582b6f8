"""Looks at a live module that end with an error are made up for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rollout import Engine, SamplingParams
from rollout.models.errors import UnsupportedModel
from rollout.models.patches.linear_products import LinearProduct
from tests.support.parity import random_prompts, teacher_forced
from tests.support.tiny_models import tiny

_PARAMS = SamplingParams(max_new_tokens=4, ignore_eos=True)


def _distance(engine: Engine, model: Any) -> float:
    records = engine.generate(random_prompts(3, 3), _PARAMS)
    return max(float((torch.tensor(r.logprobs) - teacher_forced(model, r)).abs().max()) for r in records)


def _used(model: Any) -> Engine:
    engine = Engine(model, None)
    engine.generate(random_prompts(3, 1), _PARAMS)
    return engine


def test_start_costs_a_probe_two_references_and_three_steps() -> None:
    model = tiny("llama").cpu()
    tokens: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, given: tokens.append(given["input_ids"].numel()), with_kwargs=True
    )
    Engine(model, None)
    assert tokens == [4, 24, 17, 31, 8, 2]


def test_refused_adapter_is_refused_until_it_is_gone() -> None:
    model: Any = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    engine = _used(model)
    model.peft_config["default"].alora_invocation_tokens = [1]
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 3
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match="alora_invocation_tokens"):
            engine.generate(random_prompts(3, 1), _PARAMS)
    model.peft_config["default"].alora_invocation_tokens = None
    assert _distance(engine, model) < 1e-5
    assert engine.weight_version == 1


@torch.no_grad()
def test_weights_whose_copying_was_interrupted_are_copied_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    engine = _used(model)
    for parameter in model.parameters():
        parameter.mul_(1.2)
    loads: list[LinearProduct] = []
    load = LinearProduct.load

    def interrupted(self: LinearProduct, *tensors: Any) -> None:
        loads.append(self)
        if len(loads) == 3:
            raise KeyboardInterrupt
        load(self, *tensors)

    monkeypatch.setattr(LinearProduct, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(random_prompts(3, 1), _PARAMS)
    monkeypatch.undo()
    assert _distance(engine, model) < 1e-5
    assert engine.weight_version == 1
