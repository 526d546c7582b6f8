"""Promise 6 for modules that torch.compile has compiled: training goes on with the code that was compiled before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from rollout import Engine, SamplingParams
from tests.support.devices import DEVICE
from tests.support.parity import random_prompts
from tests.support.tiny_models import shallow

_IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]], device=DEVICE)
_PROMPTS = [[5], *random_prompts(1, 4), list(range(3, 90))]
_PARAMS = SamplingParams(n=2, max_new_tokens=20)


class Backend:
    """Counts what is compiled and how often compiled code runs."""

    def __init__(self) -> None:
        self.compiled = 0
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


def whole(model: nn.Module, backend: Backend) -> nn.Module:
    return torch.compile(model, backend=backend)  # type: ignore[return-value]


def in_place(model: nn.Module, backend: Backend) -> nn.Module:
    model.compile(backend=backend)
    return model


def layers(model: Any, backend: Backend) -> nn.Module:
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model  # type: ignore[no-any-return]


def wrapped_layers(model: Any, backend: Backend) -> nn.Module:
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend=backend)
    return model  # type: ignore[no-any-return]


def forward(model: nn.Module, backend: Backend) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model: nn.Module) -> torch.Tensor:
    """Return the loss of a training step without an update."""
    model.train()
    loss: torch.Tensor = model(input_ids=_IDS, labels=_IDS).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("compile_", [whole, in_place, layers, wrapped_layers, forward])
def test_training_runs_the_same_compiled_code_after_a_rollout(
    compile_: Callable[[nn.Module, Backend], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    plain = Engine(shallow("llama"), None).generate(_PROMPTS, _PARAMS)
    backend = Backend()
    model = compile_(shallow("llama"), backend)
    for _ in range(2):
        loss = step(model)
    compiled, runs = backend.compiled, backend.runs
    assert runs > 0
    step(model)
    runs_of_a_step = backend.runs - runs

    caplog.clear()
    engine = Engine(model, None)
    for _ in range(2):
        batch = engine.generate(_PROMPTS, _PARAMS)
        assert [r.completion_ids for r in batch] == [r.completion_ids for r in plain]
        runs = backend.runs
        assert torch.equal(step(model), loss)
        assert backend.runs - runs == runs_of_a_step, "training ran eagerly"
    assert backend.compiled == compiled, "compiled again"
    assert not [r for r in caplog.records if r.name.startswith("torch") and r.levelno >= logging.WARNING]


def test_module_that_is_first_trained_after_rollouts_is_compiled_then() -> None:
    backend = Backend()
    model = whole(shallow("llama"), backend)
    engine = Engine(model, None)
    engine.generate(_PROMPTS, _PARAMS)
    assert backend.compiled == 0
    step(model)
    assert backend.compiled > 0


def test_stance_that_the_caller_set_is_kept() -> None:
    backend = Backend()
    model = whole(shallow("llama"), backend)
    step(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        Engine(model, None).generate(_PROMPTS, _PARAMS)
        step(model)
        with pytest.raises(RuntimeError, match="recompile"):
            model(input_ids=_IDS[:, :3])
