"""The probe: what each layer sees, what is refused and why, and a model that is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionMaskInterface, PreTrainedModel

from rollout.models.attention import interface
from rollout.models.attention.probe import classify, probe
from rollout.models.errors import UnsupportedModel
from rollout.models.kv_cache.layout import KVLayout, MaskKind
from rollout.models.module.borrow import BorrowedModule
from rollout.models.runners.packed import PackedStrategy
from tests.support.tiny_models import PACKED, tiny

FULL, WINDOW, CHUNK = MaskKind(), MaskKind("window", 12), MaskKind("chunk", 12)


def probed(model: nn.Module) -> KVLayout:
    with BorrowedModule(model).borrow(interface.NAME):
        return probe(model)


# -- mask_kinds -----------------------------------------------------------------------------------------------

Sees = Callable[[Any, Any], Any]


def predicate(sees: Sees) -> Callable[[Any, Any, Any, Any], Any]:
    return lambda _batch, _head, query, key: sees(query, key)


MASKS: list[tuple[Sees, int | None, MaskKind]] = [
    (lambda q, k: k <= q, None, MaskKind()),
    (lambda q, k: k <= q, 100, MaskKind()),
    (lambda q, k: (k <= q) & (k > q - 1), 1, MaskKind("window", 1)),
    (lambda q, k: (k <= q) & (k > q - 12), 12, MaskKind("window", 12)),
    (lambda q, k: (k <= q) & (k > q - 4096), 4096, MaskKind("window", 4096)),
    (lambda q, k: (k <= q) & (k // 12 == q // 12), 12, MaskKind("chunk", 12)),
    (lambda q, k: (k <= q) & (k // 8192 == q // 8192), 8192, MaskKind("chunk", 8192)),
]


@pytest.mark.parametrize(("sees", "size", "mask_kind"), MASKS)
def test_classify_recognises_mask_kinds(sees: Sees, size: int | None, mask_kind: MaskKind) -> None:
    assert classify(predicate(sees), size) == mask_kind


STRANGE: dict[str, tuple[Sees, int | None]] = {
    "both ways": (lambda q, k: k == k, None),
    "both ways, near": (lambda q, k: abs(q - k) < 12, 12),
    "one token ahead": (lambda q, k: k <= q + 1, None),
    "not itself": (lambda q, k: k < q, None),
    "every second": (lambda q, k: (k <= q) & ((q - k) % 2 == 0), None),
    "a prefix both ways": (lambda q, k: (k <= q) | (k < 4), None),
    "a window of another size": (lambda q, k: (k <= q) & (k > q - 13), 12),
    "a smaller window": (lambda q, k: (k <= q) & (k > q - 11), 12),
    "a window of unknown size": (lambda q, k: (k <= q) & (k > q - 12), None),
    "a large window of unknown size": (lambda q, k: (k <= q) & (k > q - 131072), None),
    "chunks of unknown size": (lambda q, k: (k <= q) & (k // 12 == q // 12), None),
    "chunks of another size": (lambda q, k: (k <= q) & (k // 13 == q // 13), 12),
    "a window and the first tokens": (lambda q, k: (k <= q) & ((k > q - 12) | (k < 4)), 12),
    "a window, or one's own chunk": (lambda q, k: (k <= q) & ((k > q - 12) | (k // 24 == q // 24)), 12),
    "chunks that overlap": (lambda q, k: (k <= q) & (k >= q // 12 * 12 - 1), 12),
    "nothing": (lambda q, k: k != k, None),
}


@pytest.mark.parametrize("name", STRANGE)
def test_unknown_masks_are_refused(name: str) -> None:
    sees, size = STRANGE[name]
    with pytest.raises(UnsupportedModel, match="neither causal nor a window or chunk"):
        classify(predicate(sees), size)


# -- families --------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[list[MaskKind], tuple[int, int, int]]] = {
    "llama": ([FULL] * 4, (2, 16, 16)),
    "gpt2": ([FULL] * 4, (4, 16, 16)),
    "mistral": ([WINDOW] * 4, (2, 16, 16)),
    "gemma2": ([WINDOW, FULL] * 2, (2, 16, 16)),
    "cohere2": ([WINDOW] * 3 + [FULL], (2, 16, 16)),
    "gpt_oss": ([WINDOW, FULL] * 2, (2, 16, 16)),
    "deepseek_v3": ([FULL] * 4, (4, 24, 12)),
    "qwen2_moe": ([WINDOW] + [FULL] * 3, (2, 16, 16)),
    "phimoe": ([WINDOW] * 4, (2, 16, 16)),
    "llama4_text": ([CHUNK] * 3 + [FULL], (2, 16, 16)),
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_probe_records_layouts_of_families(family: str) -> None:
    layout, (mask_kinds, dims) = probed(tiny(family)), LAYOUTS[family]
    assert [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in layout.layers] == [dims] * 4
    assert [layer.mask_kind for layer in layout.layers] == mask_kinds
    assert layout.dtype == torch.float32
    assert layout.bytes_per_token == 4 * dims[0] * (dims[1] + dims[2]) * 4
    assert layout.bytes_per_page == layout.page_size * layout.bytes_per_token


def test_module_that_attends_twice_has_two_attention_layers() -> None:
    layout = probed(tiny("diffllama"))
    assert len(layout.layers) == 2 * len({layer.module for layer in layout.layers}) == 8


@pytest.mark.parametrize("family", sorted(set(PACKED) - set(LAYOUTS) - {"diffllama"}))
def test_families_have_one_attention_layer_per_module(family: str) -> None:
    layout = probed(tiny(family))
    assert len(layout.layers) == len({layer.module for layer in layout.layers}) == 4


def test_layout_dtype_is_the_compute_dtype() -> None:
    assert probed(tiny("llama", torch.bfloat16)).dtype == torch.bfloat16
    model = tiny("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert probed(model).dtype == torch.bfloat16
    assert probed(model).dtype == torch.float32


def test_shallower_model_has_the_first_attention_layers() -> None:
    layers = probed(tiny("gemma2", num_hidden_layers=2)).layers
    assert [layer.mask_kind for layer in layers] == [WINDOW, FULL]


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "reason"), [("bloom", "no call through"), ("mamba", "recurrent state")])
def test_families_without_interface_are_refused_with_reason(family: str, reason: str) -> None:
    model = tiny(family)
    with pytest.raises(UnsupportedModel, match=reason) as error:
        probed(model)
    assert type(model).__name__ in str(error.value)
    assert repr(model.config.model_type) in str(error.value)


def test_bidirectional_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="neither causal"):
        probed(tiny("gemma3_text", use_bidirectional_attention=True))


def layer_attention(model: PreTrainedModel, layer: int) -> Any:
    return model.model.layers[layer].self_attn


def drop_mask(model: PreTrainedModel) -> None:
    """The layer attends without the mask that it is given."""
    own = layer_attention(model, 1)
    forward = own.forward
    own.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "attention_mask": None})


def mix_dtypes(model: PreTrainedModel) -> None:
    own = layer_attention(model, 2)
    own.v_proj.register_forward_hook(lambda _module, _inputs, output: output.bfloat16())
    own.o_proj.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))


def pass_something_new(model: PreTrainedModel) -> None:
    own = layer_attention(model, 3)
    forward = own.forward
    own.forward = lambda *args, **kwargs: forward(*args, **kwargs, key_bias=torch.ones(1))


def break_down(model: PreTrainedModel) -> None:
    def fail(*_arguments: object) -> None:
        raise ZeroDivisionError("in the middle of a forward")

    layer_attention(model, 1).register_forward_pre_hook(fail)


FAILURES: dict[str, tuple[Callable[[PreTrainedModel], None], type[Exception], str]] = {
    "no mask": (drop_mask, UnsupportedModel, "without a causal mask"),
    "several dtypes": (mix_dtypes, UnsupportedModel, "values of several dtypes.*bfloat16.*float32"),
    "an unknown argument": (pass_something_new, UnsupportedModel, "passes key_bias .* does not support"),
    "an error of its own": (break_down, ZeroDivisionError, "in the middle"),
}


def test_model_without_attention_calls_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="made no call"):
        probed(tiny("llama", num_hidden_layers=0))


# -- as it was -------------------------------------------------------------------------------------------


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "config": copy.deepcopy(model.config.to_dict()),
        "implementation": model.config._attn_implementation_internal,
        "training": [module.training for module in model.modules()],
        "masks": dict(AttentionMaskInterface._global_mapping),
        "parameters": {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "rng": torch.get_rng_state(),
    }


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            assert_equal(ours, theirs)
    else:
        assert one == other


@pytest.mark.parametrize("failure", [None, *FAILURES])
def test_probe_leaves_the_model_unchanged(failure: str | None) -> None:
    model = tiny("llama")
    model.train()
    layer_attention(model, 0).eval()
    model.model.embed_tokens.eval()
    if failure is not None:
        FAILURES[failure][0](model)
    before = state_of(model)
    if failure is None:
        probed(model)
    else:
        with pytest.raises(FAILURES[failure][1], match=FAILURES[failure][2]):
            probed(model)
    assert_equal(state_of(model), before)
    assert interface.NAME not in AttentionMaskInterface._global_mapping


def test_attention_call_outside_of_a_step_raises() -> None:
    """Another thread that uses the model while it generates must not get silent nonsense."""
    model = tiny("llama")
    with BorrowedModule(model).borrow(interface.NAME), pytest.raises(RuntimeError, match="outside of an engine's step"):
        model(input_ids=torch.arange(4)[None])


def test_probe_counts_the_query_heads_that_share_a_key_head() -> None:
    model = tiny("llama")
    config = model.config
    layers = PackedStrategy(model).kv_layout().layers
    assert {layer.group for layer in layers} == {config.num_attention_heads // config.num_key_value_heads} != {1}
