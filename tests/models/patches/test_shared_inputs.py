"""Groups of linear layers with the same input, and the module is unchanged by the search."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from rollout.models.arrays import version
from rollout.models.errors import UnsupportedModel
from rollout.models.patches.linears import PackedLinears
from rollout.models.patches.shared_inputs import LayerProducts, shared_inputs
from rollout.models.runners.base import RunStrategy
from rollout.models.runners.packed import PackedStrategy
from rollout.models.runners.padded import PaddedStrategy
from rollout.models.runners.recurrent import RecurrentStrategy
from tests.support.linear_groups import groups_in_probe
from tests.support.tiny_models import VOCABULARY, tiny

ATTENTION = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj")


def groups_of(model: nn.Module, strategy: type[RunStrategy] = PackedStrategy) -> list[tuple[str, ...]]:
    """Return the names of each group's layers, in order."""
    names = {id(module): name for name, module in model.named_modules()}
    return [tuple(names[id(layer)] for layer in group) for group in groups_in_probe(model, strategy)]


def in_layers(groups: dict[str, Iterable[str]], layers: int = 4, prefix: str = "model.layers") -> list[tuple[str, ...]]:
    """Return the same groups in each layer; ``groups`` maps a module to the names of its linear layers."""
    return [
        tuple(f"{prefix}.{layer}.{folder}.{last}" for last in lasts)
        for layer in range(layers)
        for folder, lasts in groups.items()
    ]


def adapted(model: PreTrainedModel, targets: Any = ("q_proj", "v_proj")) -> nn.Module:
    targets = targets if isinstance(targets, str) else list(targets)
    settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.1)
    return peft.get_peft_model(model, settings, autocast_adapter_dtype=False)


def everything(model: nn.Module) -> list[dict[str, Any]]:
    """Return the attributes of each module, with hooks and training flag."""
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
        for module in model.modules()
    ]


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


# -- groups ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "olmo2", "smollm3"])
def test_attention_and_gated_mlp_form_groups(family: str) -> None:
    assert groups_of(tiny(family)) == in_layers({"self_attn": ATTENTION, "mlp": MLP})


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "gpt2"])
def test_families_with_merged_layers_have_no_groups(family: str) -> None:
    assert groups_of(tiny(family)) == []


def test_groups_are_found_in_the_probe_of_every_strategy() -> None:
    assert groups_of(tiny("llama"), PaddedStrategy) == in_layers({"self_attn": ATTENTION, "mlp": MLP})
    assert groups_of(tiny("gpt_neo"), PaddedStrategy) == in_layers(
        {"attn.attention": ATTENTION}, prefix="transformer.h"
    )
    assert groups_of(tiny("falcon"), PaddedStrategy) == []
    assert groups_of(tiny("falcon_h1"), RecurrentStrategy) == in_layers(
        {"self_attn": ATTENTION, "feed_forward": ("up_proj", "gate_proj")}
    )
    assert groups_of(tiny("mamba2"), RecurrentStrategy) == []


def test_shared_experts_form_groups() -> None:
    """Routed experts are not linear layers; shared experts are."""
    assert groups_of(tiny("mixtral")) == in_layers({"self_attn": ATTENTION})
    shared = groups_of(tiny("qwen2_moe"))
    assert [group for group in shared if "mlp.shared_expert." in group[0]] == [
        tuple(f"model.layers.{layer}.mlp.shared_expert.{last}" for last in MLP) for layer in (1, 3)
    ]
    # A layer that receives the same input later is not part of the group.
    assert in_layers({"mlp.shared_experts": MLP})[2:] == groups_of(tiny("deepseek_v3"))[2:]


def test_group_includes_a_router_of_another_class() -> None:
    """`PackedLinears` decides which layers it can merge."""
    model = tiny("llama4_text")
    (_, first, *_) = groups_in_probe(model)
    assert type(first[0]) is not nn.Linear
    own = logits_of(model)
    with PackedLinears(model, 1 << 40, groups_in_probe(model)).applied():
        assert torch.allclose(logits_of(model), own, atol=1e-5)


def test_adapter_layers_form_groups() -> None:
    base = "base_model.model.model.layers"
    assert groups_of(adapted(tiny("llama"))) == [
        group
        for layer in range(4)
        for group in (
            (f"{base}.{layer}.self_attn.q_proj.base_layer", f"{base}.{layer}.self_attn.q_proj.lora_A.default"),
            (
                f"{base}.{layer}.self_attn.k_proj",
                f"{base}.{layer}.self_attn.v_proj.base_layer",
                f"{base}.{layer}.self_attn.v_proj.lora_A.default",
            ),
            (f"{base}.{layer}.mlp.gate_proj", f"{base}.{layer}.mlp.up_proj"),
        )
    ]


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapted_models_compute_the_same_with_groups(targets: Any, dtype: torch.dtype) -> None:
    model = adapted(tiny("llama", dtype), targets).eval()
    own, groups = logits_of(model), groups_in_probe(model)
    assert groups
    with PackedLinears(model, 1 << 40, groups).applied():
        packed = logits_of(model)
    assert float((packed - own).abs().max() / own.abs().max()) < (1e-5 if dtype == torch.float32 else 3e-2)
    model.disable_adapter_layers()
    assert groups_of(model) == [
        tuple(name + ".base_layer" * (targets == "all-linear" or name.split(".")[-1] in targets) for name in group)
        for group in in_layers({"self_attn": ATTENTION, "mlp": MLP}, prefix="base_model.model.model.layers")
    ]


def test_modules_called_twice_per_forward_form_no_group() -> None:
    model = tiny("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    assert groups_of(model) == [
        group
        for group in in_layers({"self_attn": ATTENTION, "mlp": MLP})
        if group[0] not in ("model.layers.0.mlp.gate_proj", "model.layers.2.mlp.gate_proj")
    ]


def test_group_with_a_layer_called_twice_is_dropped() -> None:
    model = tiny("llama")
    first = model.model.layers[0].self_attn
    first.register_forward_hook(lambda module, given, out: (out[0] + 0 * module.k_proj(out[0]).sum(), *out[1:]))
    assert groups_of(model) == in_layers({"self_attn": ATTENTION, "mlp": MLP})[1:]


def test_weight_of_another_dtype_leaves_its_group() -> None:
    class Own(nn.Linear):
        """A layer that multiplies in the dtype of its weight."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)

    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.v_proj.__class__ = Own
    attention.v_proj.bfloat16()
    assert groups_of(model)[0] == tuple(f"model.layers.0.self_attn.{last}" for last in ATTENTION[:2])


@pytest.mark.parametrize("inference", [False, True])
def test_input_changed_between_calls_is_not_shared(inference: bool) -> None:
    model = tiny("llama")

    def change(module: nn.Module, given: tuple[torch.Tensor], out: torch.Tensor) -> None:
        given[0].mul_(0.5)

    model.model.layers[0].mlp.gate_proj.register_forward_hook(change)
    with torch.inference_mode(inference):
        groups = groups_of(model)
    assert groups == [
        g for g in in_layers({"self_attn": ATTENTION, "mlp": MLP}) if g[0] != "model.layers.0.mlp.gate_proj"
    ]


def test_equal_but_distinct_inputs_are_not_shared() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda module, given: (given[0].clone(),))
    assert ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj") not in groups_of(model)
    assert len(groups_of(model)) == 7


def test_models_on_other_devices_have_no_groups() -> None:
    model = tiny("llama").to("meta")
    x = torch.empty(4, model.config.hidden_size, device="meta")
    with shared_inputs(model) as groups:
        for name in ATTENTION:
            model.model.layers[0].self_attn.get_submodule(name)(x)
    assert groups == []


def test_module_without_a_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel), shared_inputs(nn.Linear(2, 2)):
        pass


def test_version_counts_in_place_changes_outside_inference_mode() -> None:
    x = torch.ones(2)
    before = version(x)
    x.mul_(2.0)
    assert version(x) > before
    with torch.inference_mode():
        assert version(torch.ones(2).mul_(2.0)) == 0


# -- unchanged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda model: model, adapted])
@pytest.mark.parametrize("training", [False, True])
def test_search_leaves_the_module_unchanged(wrap: Any, training: bool) -> None:
    inner = tiny("llama", attention_dropout=0.5)
    model = wrap(inner).train(training)
    inner.model.layers[1].train(not training)
    before, generator = everything(model), torch.get_rng_state()
    assert groups_in_probe(model)
    assert everything(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off_during_the_search() -> None:
    """Dropout would create another input tensor for adapters."""
    model = adapted(tiny("llama"))
    assert groups_of(model.train()) == groups_of(model.eval())


def test_hooks_are_removed_after_an_exception() -> None:
    model = tiny("llama").train()

    def stop(module: nn.Module, given: Any) -> None:
        raise KeyError("in the middle")

    handle = model.model.layers[2].register_forward_pre_hook(stop)
    before = everything(model)
    with pytest.raises(KeyError, match="in the middle"):
        groups_in_probe(model)
    assert everything(model) == before
    handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert len(groups_in_probe(model)) == 8


def test_search_holds_no_tensors() -> None:
    model = tiny("llama")
    seen: list[weakref.ref[torch.Tensor]] = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda module, given: seen.append(weakref.ref(given[0]))
    )
    groups = groups_in_probe(model)
    handle.remove()
    assert groups
    assert [reference() for reference in seen] == [None]


def test_search_records_no_gradients() -> None:
    model = tiny("llama")
    recorded: list[bool] = []
    model.model.layers[0].register_forward_hook(lambda module, given, out: recorded.append(torch.is_grad_enabled()))
    groups_in_probe(model)
    assert recorded == [False]


def test_products_replace_layers_with_the_weights_of_each_time() -> None:
    layer, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    layers = LayerProducts([(layer, torch.zeros_like)])
    with layers.applied():
        assert not layer(x).any()
    weight = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(torch.eye(2))
    assert weight() is None
    with layers.applied():
        assert not layer(x).any()
        with layers.applied():
            assert not layer(x).any()
        assert not layer(x).any()
        layer.weight = nn.Parameter(2 * torch.eye(2))
        assert torch.equal(layer(x), 2 * x)
    assert torch.equal(layer(x), 2 * x)
