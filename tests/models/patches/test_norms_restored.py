"""Norms and rotary functions are restored, after failures and with other threads and models."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from rollout.models.patches.norms_and_rope import FusedModules
from rollout.models.patches.patching import PatchedForward, patched
from rollout.models.patches.pointwise_cpu import pointwise
from tests.support.norms_and_rope import heads, logits_of, model_of, traces
from tests.support.tiny_models import tiny

pytestmark = pytest.mark.usefixtures("kernel")


def test_nothing_is_replaced_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama")
    monkeypatch.setenv("CC", "no-such-compiler")
    pointwise.cache_clear()
    before = traces(model)
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                with FusedModules(model).applied():
                    assert traces(model) == before
    finally:
        pointwise.cache_clear()
    assert sum("pointwise.c" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_modules_and_namespaces_are_restored(family: str) -> None:
    model = tiny(family).train()
    before, generator = traces(model), torch.get_rng_state()
    parts = FusedModules(model)
    assert traces(model) == before
    for _ in range(2):
        with parts.applied():
            assert traces(model) != before
            logits_of(model)
        assert traces(model) == before
    with pytest.raises(KeyError), parts.applied():
        raise KeyError
    assert traces(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_everything_is_restored_when_applied_fails_on_entry() -> None:
    model = tiny("llama")

    def forwards() -> Iterator[PatchedForward]:
        yield PatchedForward.of(model.model.norm, abs)
        raise AttributeError("sealed")

    before = traces(model)
    with pytest.raises(AttributeError, match="sealed"), patched(forwards()):
        pass
    assert traces(model) == before


@torch.no_grad()
def test_refreshed_instance_uses_changed_weights() -> None:
    model = model_of("llama")
    parts = FusedModules(model)
    with parts.applied():
        before = logits_of(model)
    model.model.norm.weight.neg_()
    with parts.applied():
        assert torch.equal(logits_of(model), before)  # copies
    parts.refresh()
    with parts.applied():
        assert torch.allclose(logits_of(model), -before, atol=1e-6)


@pytest.fixture
def other_thread() -> Iterator[Callable[..., Any]]:
    """Call a function in another thread and return its result."""
    with ThreadPoolExecutor(1) as executor:
        yield lambda function, *arguments: executor.submit(function, *arguments).result()


def test_other_threads_use_the_familys_own_function(other_thread: Callable[..., Any], served: Counter[str]) -> None:
    """A trainer's thread needs a differentiable function."""

    def grow() -> list[torch.Tensor]:
        q, k, cos, sin = heads()
        q.requires_grad_()
        rotated = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
        sum(x.sum() for x in rotated).backward()
        assert q.grad is not None
        return [*(x.detach() for x in rotated), q.grad]

    wanted = other_thread(grow)
    with FusedModules(tiny("llama")).applied():
        served.clear()
        got = other_thread(grow)
        assert not served
        modeling_llama.apply_rotary_pos_emb(*heads())
        assert served["rotate"] == 1
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_instance_made_while_another_thread_applies_restores_the_original(
    other_thread: Callable[..., Any], served: Counter[str]
) -> None:
    """It restores the family's own function, not the fused one that was in place at construction."""
    own = modeling_llama.apply_rotary_pos_emb
    first, second = FusedModules(tiny("llama")), tiny("llama")
    with first.applied():
        parts = other_thread(FusedModules, second)
    with parts.applied():
        served.clear()
        logits_of(second)
        assert served == Counter(rms_norm=9, rotate=4)
    assert modeling_llama.apply_rotary_pos_emb is own


def test_overlapping_blocks_of_two_threads_restore_everything(other_thread: Callable[..., Any]) -> None:
    own = modeling_llama.apply_rotary_pos_emb
    models = [tiny("llama"), tiny("llama")]
    wanted = logits_of(models[0])
    parts = [FusedModules(model) for model in models]
    here, there = parts[0].applied(), parts[1].applied()
    here.__enter__()
    other_thread(there.__enter__)
    here.__exit__(None, None, None)
    assert torch.allclose(other_thread(logits_of, models[1]), wanted, atol=1e-5)
    assert torch.equal(logits_of(models[0]), wanted)
    other_thread(there.__exit__, None, None, None)
    assert modeling_llama.apply_rotary_pos_emb is own
    assert not any("forward" in vars(module) for model in models for module in model.modules())
