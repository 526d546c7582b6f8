"""Rotary embeddings of a borrowed module follow the length of each sequence, and the module is restored."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rollout.models.errors import UnsupportedModel
from rollout.models.module.borrow import BorrowedModule
from rollout.models.module.rope import Rotary, use_sequence_lengths
from rollout.models.runners.packed import PackedStrategy
from rollout.models.runners.padded import PaddedStrategy
from tests.contract.test_long_sequences import long_model
from tests.support.tiny_models import tiny

_POSITIONS = torch.tensor([[0, 1, 30, 39, 0, 7, 50, 90]])
_LENGTHS = np.array([[40, 40, 40, 40, 41, 95, 95, 95]])


def embedding(model: Any, positions: torch.Tensor) -> torch.Tensor:
    return torch.stack(model.model.rotary_emb(torch.zeros(1), positions))


@pytest.mark.parametrize("family", ["phi3", "phimoe"])
def test_each_token_follows_the_length_of_its_sequence(family: str) -> None:
    model = long_model(family)
    short = embedding(model, _POSITIONS[:, :4])
    long = embedding(model, _POSITIONS[:, 4:])
    assert not torch.allclose(embedding(model, torch.tensor([[7]])), long[:, :, 1:2])
    with BorrowedModule(model).borrow(), use_sequence_lengths(_LENGTHS):
        assert torch.equal(embedding(model, _POSITIONS), torch.cat([short, long], 2))
    with BorrowedModule(model).borrow(), use_sequence_lengths(_LENGTHS[:, 4:]):
        assert torch.equal(embedding(model, _POSITIONS[:, 4:]), long)
    with BorrowedModule(model).borrow(), use_sequence_lengths(_LENGTHS[:, :4]):
        assert torch.equal(embedding(model, _POSITIONS[:, :4]), short)


def test_sequences_side_by_side_follow_their_own_lengths() -> None:
    model = long_model("phi3")
    positions = torch.tensor([[3, 4], [3, 4]])
    with BorrowedModule(model).borrow(), use_sequence_lengths(np.array([[5], [60]])):
        found = embedding(model, positions)
    assert torch.equal(found[:, 0], embedding(model, positions[:1])[:, 0])
    assert torch.equal(found[:, 1], embedding(model, torch.tensor([[3, 4, 59]]))[:, 0, :2])


def test_forward_without_sequence_lengths_is_the_models_own() -> None:
    model = long_model("phi3")
    own = [embedding(model, positions) for positions in (_POSITIONS[:, :4], _POSITIONS)]
    with BorrowedModule(model).borrow():
        for positions, expected in zip((_POSITIONS[:, :4], _POSITIONS), own, strict=True):
            assert torch.equal(embedding(model, positions), expected)


def test_module_is_restored_after_borrowing() -> None:
    model = long_model("phi3")
    rotary = model.model.rotary_emb
    attributes, buffers = set(vars(rotary)), dict(rotary.named_buffers())
    contents = copy.deepcopy(buffers)
    with BorrowedModule(model).borrow(), use_sequence_lengths(_LENGTHS):
        embedding(model, _POSITIONS)
        assert "forward" in vars(rotary)
    assert set(vars(rotary)) == attributes
    assert all(buffer is buffers[name] for name, buffer in rotary.named_buffers())
    assert all(torch.equal(buffers[name], content) for name, content in contents.items())


def test_forward_patched_by_the_caller_is_used_and_kept() -> None:
    model = long_model("phi3")
    rotary = model.model.rotary_emb
    own = rotary.forward

    def doubled(*arguments: Any) -> tuple[torch.Tensor, ...]:
        return tuple(2 * tensor for tensor in own(*arguments))

    rotary.forward = doubled
    with BorrowedModule(model).borrow(), use_sequence_lengths(_LENGTHS[:, 4:]):
        found = embedding(model, _POSITIONS[:, 4:])
    assert rotary.forward is doubled
    assert torch.equal(found, embedding(model, _POSITIONS[:, 4:]))


# transformers' own forward fails at the second long sequence in that version.
@pytest.mark.xfail(transformers.__version__ == "5.17.0", raises=UnboundLocalError, reason="transformers 5.17.0")
def test_layer_types_switch_on_their_own() -> None:
    rope = {
        "full_attention": long_model("phi3").config.rope_parameters,
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    model = tiny("gemma3_text", rope_parameters=rope, sliding_window=12, num_hidden_layers=6)
    assert Rotary(model).boundary == 40
    rotary = model.model.rotary_emb

    def embed(layer_type: str, positions: torch.Tensor) -> torch.Tensor:
        return torch.stack(rotary(torch.zeros(1), positions, layer_type))

    for layer_type in rope:
        short, long = embed(layer_type, _POSITIONS[:, :4]), embed(layer_type, _POSITIONS[:, 4:])
        with BorrowedModule(model).borrow(), use_sequence_lengths(_LENGTHS):
            assert torch.equal(embed(layer_type, _POSITIONS), torch.cat([short, long], 2))


def test_layouts_hold_the_longrope_boundary() -> None:
    model = long_model("phi3")
    for strategy in (PackedStrategy, PaddedStrategy):
        layout = strategy(model).kv_layout()
        assert layout.boundary == 40
        assert layout.alike(40, 3)
        assert layout.alike(41, 90)
        assert not layout.alike(40, 41)
    plain = PackedStrategy(tiny("llama")).kv_layout()
    assert plain.boundary is None
    assert plain.alike(1, 10**9)


def test_several_longrope_boundaries_are_refused() -> None:
    model = long_model("phi3")
    model.model.layers[0].rotary = copy.deepcopy(model.model.rotary_emb)
    model.model.layers[0].rotary.config.rope_parameters["original_max_position_embeddings"] = 50
    with pytest.raises(UnsupportedModel, match=r"several lengths: \[40, 50\]"):
        PackedStrategy(model).kv_layout()
