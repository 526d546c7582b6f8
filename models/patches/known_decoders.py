"""Recognise models whose decoder layers have the form of Llama's, by the bytecode of their forwards.

What is recognised computes exactly what ``csrc/decoder_layers.c`` does. Every module between the embedding and the last
norm must be as its family wrote it: without hooks, patched forwards or adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from rollout.models.patches.fused_blocks import ACTIVATIONS, LAYERS
from rollout.models.patches.fused_norms import FusedNorm
from rollout.models.patches.linear_products import LinearProduct
from rollout.models.patches.linears import PackedLinears
from rollout.models.patches.llama_blocks import (
    ATTENTIONS,
    HEAD_NORMING_ATTENTIONS,
    HOOKS,
    MLPS,
    bytecode,
    plain_layers,
)
from rollout.models.patches.norms_and_rope import FusedModules

_MODELS = frozenset(bytecode(kind) for kind in (LlamaModel, MistralModel, Qwen2Model, Qwen3Model))
_CALLS = (nn.Module.__call__, GradientCheckpointingLayer.__call__)


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The heads of an attention module."""

    heads: int
    kv_heads: int
    dim: int
    scale: float


@dataclass(frozen=True, slots=True)
class KnownLayer:
    """What a decoder layer computes with."""

    attention: nn.Module
    shape: HeadShape
    linears: tuple[nn.Linear, ...]
    products: tuple[LinearProduct, ...]
    """Query, key and value; output; gate and up; down."""
    norms: tuple[FusedNorm, FusedNorm]
    """Before attention and before the MLP."""
    head_norms: tuple[FusedNorm, FusedNorm] | None
    """Of queries and keys."""


@dataclass(frozen=True, slots=True)
class KnownDecoder:
    """A base model, from tokens to hidden states."""

    model: Any
    layers: tuple[KnownLayer, ...]
    last_norm: FusedNorm
    dtype: torch.dtype
    hidden: int
    inner: int


def known_decoder(model: nn.Module, fused: FusedModules, linears: PackedLinears) -> KnownDecoder | None:
    """Return the base model inside a model if its layers are known and all of their parts are patched; else None."""
    if _has_any_global_hook():
        return None
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and bytecode(type(module)) in _MODELS:
            return _decoder(module, fused, linears)
    return None


def _decoder(model: Any, fused: FusedModules, linears: PackedLinears) -> KnownDecoder | None:
    """Return the parts of a base model whose forward is known, None if any of them is not."""
    between = [*model.layers.modules(), *model.norm.modules()]
    if "forward" in vars(model) or not all(_is_plain(module) for module in between):
        return None
    last_norm, layers = fused.norm(model.norm), []
    for module in model.layers[: model.config.num_hidden_layers]:
        layer = _layer(module, fused, linears)
        if layer is None:
            return None
        layers.append(layer)
    if last_norm is None or not layers or not _are_alike(layers, last_norm):
        return None
    down = layers[0].linears[-1]
    dtype = last_norm.factors.dtype
    return KnownDecoder(model, tuple(layers), last_norm, dtype, hidden=down.out_features, inner=down.in_features)


def _are_alike(layers: Sequence[KnownLayer], last_norm: FusedNorm) -> bool:
    """Return whether all layers have the same shapes, norms and one dtype."""
    norms = [last_norm, *(norm for layer in layers for norm in layer.norms)]
    pairs = [layer.head_norms for layer in layers if layer.head_norms is not None]
    head_norms = [norm for pair in pairs for norm in pair]
    kinds = {(norm.eps, norm.late) for norm in norms}
    head_kinds = {(norm.eps, norm.late) for norm in head_norms}
    shapes = {(layer.shape, *(linear.weight.shape for linear in layer.linears)) for layer in layers}
    dtypes = {norm.factors.dtype for norm in (*norms, *head_norms)}
    weights = [product.packed for layer in layers for product in layer.products]
    dtypes |= {weight.dtype for weight in weights if weight is not None}
    return (
        len(kinds) == len(shapes) == len(dtypes) == 1
        and len(head_kinds) <= 1
        and len(pairs) in (0, len(layers))
        and None not in weights
    )


def _layer(layer: Any, fused: FusedModules, linears: PackedLinears) -> KnownLayer | None:
    """Return what a decoder layer computes with, None if any part of it is unknown."""
    if bytecode(type(layer)) not in LAYERS:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    norming = bytecode(type(attention)) in HEAD_NORMING_ATTENTIONS
    projections = plain_layers(attention, ATTENTIONS | HEAD_NORMING_ATTENTIONS, "q_proj", "k_proj", "v_proj", "o_proj")
    gated = plain_layers(mlp, MLPS, "gate_proj", "up_proj", "down_proj")
    if projections is None or gated is None or type(mlp.act_fn) not in ACTIVATIONS or not fused.rotates(attention):
        return None
    groups = (projections[:3], projections[3:], gated[:2], gated[2:])
    products = [linears.product_of(*group) for group in groups]
    modules = [layer.input_layernorm, layer.post_attention_layernorm]
    norms = [fused.norm(module) for module in modules + ([attention.q_norm, attention.k_norm] if norming else [])]
    shape = _head_shape(attention, projections)
    known_products = [product for product in products if product is not None]
    known_norms = [norm for norm in norms if norm is not None]
    if shape is None or len(known_products) != len(products) or len(known_norms) != len(norms):
        return None
    return KnownLayer(
        attention=attention,
        shape=shape,
        linears=(*projections, *gated),
        products=tuple(known_products),
        norms=(known_norms[0], known_norms[1]),
        head_norms=(known_norms[2], known_norms[3]) if norming else None,
    )


def _head_shape(attention: Any, projections: Sequence[nn.Linear]) -> HeadShape | None:
    """Return the heads of an attention module, None if its projections do not fit together."""
    query, key, value, output = projections
    dim = int(attention.head_dim)
    heads, kv_heads = query.out_features // dim, key.out_features // dim
    sizes = (query.out_features, output.in_features, key.out_features, value.out_features)
    if dim % 2 or sizes != (heads * dim, heads * dim, kv_heads * dim, kv_heads * dim) or heads % kv_heads:
        return None
    return HeadShape(heads, kv_heads, dim, float(attention.scaling))


def _is_plain(module: nn.Module) -> bool:
    """Return whether a call of a module runs the forward of its class and nothing else."""
    hooked = any(getattr(module, hooks) for hooks in HOOKS)
    return not hooked and "forward" not in vars(module) and type(module).__call__ in _CALLS
