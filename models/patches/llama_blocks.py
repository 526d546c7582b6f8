"""Forwards of llama-like attention and MLP modules on a CPU with fewer Python calls between the matrix products.

Around their products transformers' modules make views and transposes of heads, call a rotary function, look up an
attention function and call a module for each layer. When few rows decode, that takes longer than the arithmetic. Only
modules whose forward has the same bytecode as one of those below are replaced, so the result is known to be the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from rollout.models.attention.base import PagedAttention
from rollout.models.attention.interface import ScoreParams, current_attention
from rollout.models.patches.pointwise_cpu import Pointwise

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Forward = Callable[..., Any]


def fast_attention(module: nn.Module, kernel: Pointwise) -> Forward | None:
    """Return a faster forward for an attention module, None if its own forward is unknown.

    The module's family must rotate the halves of heads, as `Pointwise.rotate` does.
    """
    layers = plain_layers(module, ATTENTIONS, "q_proj", "k_proj", "v_proj", "o_proj")
    if layers is None:
        return None
    own: Forward = module.forward
    *input_layers, output_layer = layers
    dim, scores = int(module.head_dim), ScoreParams(float(module.scaling))  # type: ignore[arg-type]

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        attention = current_attention()
        batch, tokens, _ = hidden_states.shape
        if (
            not isinstance(attention, PagedAttention)
            or batch != 1
            or position_embeddings is None
            or past_key_values is not None
        ):
            return own(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        cosines, sines = position_embeddings
        q, k, v = (layer.forward(hidden_states).view(tokens, -1, dim) for layer in input_layers)
        if not q.dtype == k.dtype == cosines.dtype or cosines.shape != (1, tokens, dim) or q.dtype not in kernel.dtypes:
            return own(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        q, k = kernel.rotate(q, k, cosines[0], sines[0])
        return output_layer.forward(attention.attend_tokens(module, q, k, v, scores).view(1, tokens, -1)), None

    return forward


def fast_mlp(module: nn.Module) -> Forward | None:
    """Return a faster forward for a gated MLP, None if its own forward is unknown."""
    layers = plain_layers(module, MLPS, "gate_proj", "up_proj", "down_proj")
    if layers is None:
        return None
    gate, up, down = layers
    activation: Forward = module.act_fn  # type: ignore[assignment]

    def forward(x: torch.Tensor) -> torch.Tensor:
        return down.forward(activation(gate.forward(x)) * up.forward(x))

    return forward


def plain_layers(module: nn.Module, known: frozenset[object], *names: str) -> list[nn.Linear] | None:
    """Return the linear layers of these names, None if the module's forward is unknown or a layer has hooks."""
    if "forward" in vars(module) or not inspect.isfunction(type(module).forward):
        return None
    layers = [layer for name in names if isinstance(layer := getattr(module, name, None), nn.Linear)]
    hooked = _has_any_global_hook() or any(getattr(layer, hooks) for layer in layers for hooks in HOOKS)
    if len(layers) != len(names) or hooked or bytecode(type(module)) not in known:
        return None
    return layers


def bytecode(kind: type[nn.Module]) -> object:
    """Return what identifies a forward: instructions, names, and constants other than strings."""
    code: CodeType = inspect.unwrap(kind.forward).__code__
    return code.co_code, code.co_names, code.co_varnames, tuple(c for c in code.co_consts if not isinstance(c, str))


ATTENTIONS = frozenset(bytecode(kind) for kind in (LlamaAttention, MistralAttention, Qwen2Attention))
HEAD_NORMING_ATTENTIONS = frozenset([bytecode(Qwen3Attention)])
MLPS = frozenset([bytecode(LlamaMLP)])
