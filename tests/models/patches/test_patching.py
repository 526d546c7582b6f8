"""Forwards that are replaced for a while; patches of the caller are kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rollout import Engine, SamplingParams
from rollout.models.patches.patching import PatchedForward, patched
from tests.support.tiny_models import tiny

ONE = torch.ones(1)


def test_forwards_are_replaced_only_inside_the_block() -> None:
    first, second = nn.Identity(), nn.Identity()
    with patched([PatchedForward.of(first, lambda x: 2 * x), PatchedForward.of(second, lambda x: 3 * x)]):
        assert (first(ONE).item(), second(ONE).item()) == (2, 3)
    assert first(ONE).item() == second(ONE).item() == 1
    assert "forward" not in vars(first) | vars(second)


def test_forward_patched_before_the_block_is_used_and_kept() -> None:
    module = nn.Identity()
    module.forward = lambda x: 5 * x  # type: ignore[method-assign]
    with patched([PatchedForward.of(module, lambda x: 2 * x)]):
        assert module(ONE).item() == 5
    assert module(ONE).item() == 5


def test_forward_patched_inside_the_block_is_kept() -> None:
    module = nn.Identity()
    with patched([PatchedForward.of(module, lambda x: 2 * x)]):
        module.forward = lambda x: 7 * x  # type: ignore[method-assign]
    assert module(ONE).item() == 7


def test_forwards_are_restored_after_an_exception() -> None:
    module = nn.Identity()
    with pytest.raises(ZeroDivisionError), patched([PatchedForward.of(module, lambda x: 2 * x)]):
        raise ZeroDivisionError
    assert module(ONE).item() == 1


def test_layer_patched_between_two_records_uses_the_patch() -> None:
    """The patch takes effect in the next step and stays."""
    model = tiny("llama")
    calls = 0
    layer = model.model.layers[0].mlp.down_proj
    own = layer.forward

    def counted(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return own(x)

    prompts = [[5, 6, 7 + i] for i in range(4)]
    params = [SamplingParams(max_new_tokens=3 + 4 * i, ignore_eos=True) for i in range(4)]
    stream = Engine(model, None).stream(prompts, params)
    next(stream)
    layer.forward = counted
    records = list(stream)
    assert len(records) == 3
    assert calls >= 12
    assert layer.forward is counted
