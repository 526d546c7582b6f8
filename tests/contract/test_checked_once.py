"""What trainers do between two calls costs no second start check, and is no change of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock, patch

import accelerate
import peft
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from rollout import Engine, SamplingParams
from rollout.engine import live_module
from tests.support.devices import DEVICE
from tests.support.tiny_models import tiny

_PARAMS = SamplingParams(max_new_tokens=3)
_IDS = torch.tensor([[5, 6, 7, 8]], device=DEVICE)


def _plain(model: Any) -> Any:
    return model


def _checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable()
    return model


def _adapted(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def _prepared(model: Any) -> Any:
    return accelerate.Accelerator(mixed_precision="bf16").prepare(model)


def _nothing(_: Any) -> None:
    pass


def _switch_checkpointing(model: Any) -> None:
    """As TRL does around every forward without gradients."""
    model.gradient_checkpointing_disable()
    model.gradient_checkpointing_enable()


def _switch_adapter(model: Any) -> None:
    with model.disable_adapter():
        model(_IDS)


def _register_anew(model: Any) -> None:
    layer = model.model.layers[0]
    layer._forward_hooks.clear()
    layer.register_forward_hook(_note)


def _note(*_: object) -> None:
    pass


def _switch_everything(model: Any) -> None:
    model.set_attn_implementation("eager")
    model.eval()
    model.requires_grad_(False)
    model.generate(_IDS, max_new_tokens=2)
    model.set_attn_implementation("sdpa")
    model.train()
    model.requires_grad_(True)


@pytest.fixture
def start_check() -> Iterator[MagicMock]:
    with patch.object(live_module, "check_parity", wraps=live_module.check_parity) as check:
        yield check
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(
    ("make", "habit"),
    [
        (_checkpointed, _switch_checkpointing),
        (_adapted, _switch_adapter),
        (_prepared, _nothing),
        (_plain, _register_anew),
        (_plain, _switch_everything),
    ],
)
def test_habit_between_calls_costs_no_start_check(
    start_check: MagicMock, make: Callable[[nn.Module], nn.Module], habit: Callable[[nn.Module], None]
) -> None:
    model = make(tiny("llama", num_hidden_layers=2))
    model.train()
    habit(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine = Engine(model, None)
    for version in range(3):
        for _ in range(2):
            engine.generate([[5, 6]], _PARAMS)
            assert engine.weight_version == version
            habit(model)
        model(input_ids=_IDS, labels=_IDS).loss.backward()
        optimizer.step()
    assert start_check.call_count == 1


def test_another_hook_is_checked(start_check: MagicMock) -> None:
    model = tiny("llama", num_hidden_layers=2)
    engine = Engine(model, None)
    for factor in (1.0, 2.0):  # functions of the same code
        hook = model.model.norm.register_forward_hook(lambda _m, _i, output, factor=factor: factor * output)
        engine.generate([[5, 6]], _PARAMS)
        hook.remove()
    assert start_check.call_count == 3
