"""Faster forwards of attention and MLP modules: where they apply, and that they match the module's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rollout import Engine, SamplingParams
from rollout.engine import patches
from rollout.models.patches import norms_and_rope
from rollout.models.patches.llama_blocks import fast_attention, fast_mlp
from rollout.models.patches.pointwise_cpu import Pointwise, pointwise
from tests.support.tiny_models import tiny

KNOWN = ("llama", "mistral", "qwen2", "mixtral", "granite")
UNKNOWN = ("gemma2", "qwen3", "phi3", "gpt_oss", "opt")


@pytest.fixture
def kernel() -> Pointwise:
    found = pointwise()
    if found is None:
        pytest.skip("no C compiler here")
    return found


def attentions(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith(("self_attn", "attn"))]


@pytest.mark.parametrize("family", KNOWN)
def test_known_families_get_a_faster_attention(family: str, kernel: Pointwise) -> None:
    found = attentions(tiny(family))
    assert found
    assert all(fast_attention(module, kernel) for module in found)


@pytest.mark.parametrize("family", UNKNOWN)
def test_other_families_keep_their_attention(family: str, kernel: Pointwise) -> None:
    found = attentions(tiny(family))
    assert found
    assert not any(fast_attention(module, kernel) for module in found)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_mlp_has_the_bits_of_its_own_forward(dtype: torch.dtype) -> None:
    mlp: Any = tiny("llama").to(dtype).model.layers[0].mlp
    x = torch.arange(3 * mlp.hidden_size).sin().view(1, 3, -1).to(dtype)
    fast = fast_mlp(mlp)
    assert fast is not None
    assert torch.equal(fast(x), mlp(x))
    assert fast(x).abs().sum() > 0


@torch.no_grad()
def test_fast_attention_outside_of_a_step_uses_the_modules_own(kernel: Pointwise) -> None:
    model: Any = tiny("llama")
    layer = model.model.layers[0].self_attn
    fast = fast_attention(layer, kernel)
    assert fast is not None
    x = torch.arange(5 * model.config.hidden_size).sin().view(1, 5, -1)
    angles = model.model.rotary_emb(x, torch.arange(5)[None])
    assert torch.equal(fast(x, angles)[0], layer(x, angles)[0])
    assert torch.equal(fast(hidden_states=x, position_embeddings=angles)[0], layer(x, angles)[0])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_engine_generates_the_same_with_and_without_fast_blocks(
    family: str, kernel: Pointwise, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    prompts, params = [[5, 6, 7], [8] * 9, [9, 3] * 4], SamplingParams(max_new_tokens=12, ignore_eos=True)
    used: list[nn.Module] = []

    def spied(module: nn.Module, kernel: Pointwise) -> Any:
        forward = fast_attention(module, kernel)
        return forward and (lambda *a, **k: (used.append(module), forward(*a, **k))[1])

    monkeypatch.setattr(patches, "decoder_stack", lambda *_: None)
    monkeypatch.setattr(norms_and_rope, "fast_attention", spied)
    short = Engine(model, None).generate(prompts, params, seed=4)
    assert {id(module) for module in used} == {id(module) for module in attentions(model)}
    monkeypatch.setattr(norms_and_rope, "fast_attention", lambda module, kernel: None)
    monkeypatch.setattr(norms_and_rope, "fast_mlp", lambda module: None)
    for one, other in zip(short, Engine(model, None).generate(prompts, params, seed=4), strict=True):
        assert one.completion_ids == other.completion_ids
        assert one.logprobs == other.logprobs


def test_blocks_with_hooked_layers_are_not_replaced(kernel: Pointwise) -> None:
    model: Any = tiny("llama")
    layer = model.model.layers[0]
    handles = [part.register_forward_hook(lambda *_: None) for part in (layer.self_attn.k_proj, layer.mlp.up_proj)]
    assert fast_attention(layer.self_attn, kernel) is None
    assert fast_mlp(layer.mlp) is None
    for handle in handles:
        handle.remove()
    assert fast_attention(layer.self_attn, kernel) is not None
    assert fast_mlp(layer.mlp) is not None


def test_blocks_with_adapters_are_not_replaced(kernel: Pointwise) -> None:
    adapted: Any = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    layer = adapted.get_base_model().model.layers[0]
    assert fast_attention(layer.self_attn, kernel) is None
    assert fast_mlp(layer.mlp) is None


def test_patched_and_overridden_forwards_are_not_replaced(kernel: Pointwise) -> None:
    layer: Any = tiny("llama").model.layers[0]

    class Own(type(layer.self_attn)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    layer.self_attn.__class__ = Own
    assert fast_attention(layer.self_attn, kernel) is None
    own = layer.mlp.forward
    layer.mlp.forward = lambda x: 2 * own(x)
    assert fast_mlp(layer.mlp) is None
