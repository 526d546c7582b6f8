"""Promises 1 and 6 in several threads: each runs the module as if it were alone, or is told what to do."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from rollout import Batch, Engine, SamplingParams
from rollout.batcher.types import Decision, Observation
from tests.support.devices import DEVICE
from tests.support.parity import random_prompts
from tests.support.tiny_models import shallow

_IDS = torch.tensor([[5, 6, 7, 8, 9, 10]], device=DEVICE)
_SHORT, _LONG = random_prompts(1, 5, longest=6), random_prompts(2, 7, longest=200)
_PARAMS = SamplingParams(n=2, max_new_tokens=16)
_TIMEOUT_S = 60.0


class Calling:
    """A policy that calls a function in every decision, while the module is borrowed."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function

    def decide(self, observation: Observation) -> Decision:
        self._function()
        return Decision(observation.live_rows + 4, prefill_tokens=512, reason="test")


def in_thread(function: Callable[[], Any]) -> Any:
    """Return what a function returns in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(_TIMEOUT_S)


def tokens(batch: Batch) -> list[tuple[list[int], list[float]]]:
    return [(record.completion_ids, record.logprobs) for record in batch]


def gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    model(input_ids=_IDS, labels=_IDS).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@contextmanager
def meeting(*models: nn.Module) -> Iterator[None]:
    """Let the first forwards of two modules in two threads wait for each other."""
    barrier = threading.Barrier(len(models), timeout=_TIMEOUT_S)
    waited: set[nn.Module] = set()

    def wait(model: nn.Module, *_: object) -> None:
        if model not in waited:
            waited.add(model)
            barrier.wait()

    handles = [model.register_forward_pre_hook(wait) for model in models]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "qwen3_5_text"])
def test_training_step_in_another_thread_is_as_if_alone(family: str) -> None:
    """Patched layers have no gradients, and the engine's attention knows no other forward than its own."""
    model = shallow(family)
    model.train()
    own = [gradient.clone() for gradient in gradients(model)]
    wanted = Engine(model, None).generate(_SHORT, _PARAMS)
    steps: list[list[torch.Tensor]] = []

    def train() -> None:
        if len(steps) < 3:
            steps.append([gradient.clone() for gradient in in_thread(lambda: gradients(model))])

    batch = Engine(model, None, policy=Calling(train)).generate(_SHORT, _PARAMS)
    assert [r.completion_ids for r in batch] == [r.completion_ids for r in wanted]
    assert len(steps) == 3
    for step in steps:
        assert all(map(torch.equal, step, own))


def test_training_step_with_dropout_in_another_thread_is_told_what_to_do() -> None:
    model = shallow("llama", attention_dropout=0.1)
    model.train()
    with pytest.raises(RuntimeError, match="Another thread generates with this module"):
        Engine(model, None, policy=Calling(lambda: in_thread(lambda: gradients(model)))).generate(_SHORT, _PARAMS)
    assert all(module.training for module in model.modules())
    gradients(model)


def test_copy_that_another_thread_makes_inside_a_step_is_a_model_of_its_own() -> None:
    model = shallow("llama")
    copies: list[nn.Module] = []
    copy_once = Calling(lambda: copies or copies.append(in_thread(lambda: copy.deepcopy(model))))
    Engine(model, None, policy=copy_once).generate(_SHORT, _PARAMS)
    copied = copies[0]
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    loaded = shallow("llama")
    loaded.load_state_dict(copied.state_dict())
    assert torch.equal(copied(_IDS).logits, loaded(_IDS).logits)
    assert all(map(torch.equal, gradients(copied), gradients(loaded)))
    wanted = Engine(loaded, None).generate(_SHORT, _PARAMS)
    assert [r.completion_ids for r in Engine(copied, None).generate(_SHORT, _PARAMS)] == [
        r.completion_ids for r in wanted
    ]


def test_two_engines_of_one_module_take_turns() -> None:
    model = shallow("llama")
    wanted = [tokens(Engine(model, None).generate(prompts, _PARAMS)) for prompts in (_SHORT, _LONG)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            calls = [pool.submit(Engine(model, None).generate, prompts, _PARAMS) for prompts in (_SHORT, _LONG)]
            assert [tokens(call.result(_TIMEOUT_S)) for call in calls] == wanted


def test_engine_that_starts_while_another_is_inside_a_step_packs_the_same_layers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = shallow("llama")
    wanted = tokens(Engine(model, None).generate(_LONG, _PARAMS))
    second = Engine(model, None)
    with ThreadPoolExecutor(1) as pool:
        started: list[Any] = []

        def start() -> None:
            if not started:
                started.append(pool.submit(second.generate, _LONG, _PARAMS))
                with pytest.raises(TimeoutError):
                    started[0].result(0.5)  # it waits for this step

        Engine(model, None, policy=Calling(start)).generate(_SHORT, _PARAMS)
        assert tokens(started[0].result(_TIMEOUT_S)) == wanted
    assert "not packed" not in caplog.text


def test_engine_that_is_made_while_another_is_inside_a_step_packs_the_same_layers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = shallow("llama")
    wanted = tokens(Engine(model, None).generate(_LONG, _PARAMS))
    with ThreadPoolExecutor(1) as pool:
        made: list[Any] = []

        def make() -> None:
            if not made:
                made.append(pool.submit(Engine, model, None))
                with pytest.raises(TimeoutError):
                    made[0].result(0.5)  # it waits for this step

        Engine(model, None, policy=Calling(make)).generate(_SHORT, _PARAMS)
        assert tokens(made[0].result(_TIMEOUT_S).generate(_LONG, _PARAMS)) == wanted
    assert "not packed" not in caplog.text


@pytest.mark.parametrize("families", [("llama", "llama"), ("llama", "gemma2"), ("bloom", "mamba")])
def test_engines_of_two_modules_run_side_by_side(families: tuple[str, str]) -> None:
    """Their forwards wait for each other: in the probe, in the first decode and in the tenth."""
    models = [shallow(family) for family in families]
    given = list(zip(models, (_SHORT, _LONG), strict=True))
    wanted = [tokens(Engine(model, None).generate(prompts, _PARAMS)) for model, prompts in given]
    barrier = threading.Barrier(2, timeout=_TIMEOUT_S)

    def call(model: nn.Module, prompts: list[list[int]]) -> Batch:
        with_policy = iter(range(1000))
        wait = Calling(lambda: next(with_policy) < 10 and barrier.wait())
        return Engine(model, None, policy=wait).generate(prompts, _PARAMS)

    with meeting(*models), ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(call, *arguments) for arguments in given]
        assert [[ids for ids, _ in tokens(c.result(_TIMEOUT_S))] for c in calls] == [
            [ids for ids, _ in completions] for completions in wanted
        ]
    for model in models:
        assert not any("forward" in vars(module) for module in model.modules())
        assert gradients(model)
