"""Attention and MLP modules of llama's kind on a CPU: what they compute, in fewer calls between their products.

What transformers' modules do around their products (views and transposes of heads, a rotary function, the look-up of an
attention function, a call of a module for each) takes longer than the arithmetic in it when few rows decode. A module
whose own forward is one of those below, instruction by instruction, is known to compute the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from rollout.models.attention.base import PagedAttention
from rollout.models.attention.interface import ScoreParams, current_attention
from rollout.models.patches.pointwise_cpu import Pointwise

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Forward = Callable[..., Any]


def shorter_attention(module: nn.Module, kernel: Pointwise) -> Forward | None:
    """The forward of an attention module in fewer calls; None where its own is none of those known.

    The module's family must rotate halves of heads, as `Pointwise.rotate` does.
    """
    layers = _plain_layers(module, _ATTENTIONS, "q_proj", "k_proj", "v_proj", "o_proj")
    if layers is None:
        return None
    own: Forward = module.forward
    *inputs, result = layers
    dim, scores = int(module.head_dim), ScoreParams(float(module.scaling))  # type: ignore[arg-type]

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        step = current_attention()
        batch, tokens, _ = hidden_states.shape
        if (
            not isinstance(step, PagedAttention)
            or batch != 1
            or position_embeddings is None
            or past_key_values is not None
        ):
            return own(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        cosines, sines = position_embeddings
        q, k, v = (layer.forward(hidden_states).view(tokens, -1, dim) for layer in inputs)
        if not q.dtype == k.dtype == cosines.dtype or cosines.shape != (1, tokens, dim) or q.dtype not in kernel.dtypes:
            return own(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        q, k = kernel.rotate(q, k, cosines[0], sines[0])
        return result.forward(step.attend_tokens(module, q, k, v, scores).view(1, tokens, -1)), None

    return forward


def shorter_mlp(module: nn.Module) -> Forward | None:
    """The forward of a gated MLP in fewer calls; None where its own is not the known one."""
    layers = _plain_layers(module, _MLPS, "gate_proj", "up_proj", "down_proj")
    if layers is None:
        return None
    gate, up, down = layers
    activation: Forward = module.act_fn  # type: ignore[assignment]

    def forward(x: torch.Tensor) -> torch.Tensor:
        return down.forward(activation(gate.forward(x)) * up.forward(x))

    return forward


def _plain_layers(module: nn.Module, known: frozenset[object], *names: str) -> list[nn.Linear] | None:
    """The module's linear layers of these names; None where its forward is not known, or someone listens to a layer."""
    if "forward" in vars(module) or not inspect.isfunction(type(module).forward):
        return None
    layers = [layer for name in names if isinstance(layer := getattr(module, name, None), nn.Linear)]
    watched = any(getattr(layer, hooks) for layer in layers for hooks in _HOOKS)
    return layers if len(layers) == len(names) and not watched and _instructions(type(module)) in known else None


def _instructions(kind: type[nn.Module]) -> object:
    """What tells two forwards apart: instructions, names, and constants but texts."""
    code: CodeType = inspect.unwrap(kind.forward).__code__
    return code.co_code, code.co_names, code.co_varnames, tuple(c for c in code.co_consts if not isinstance(c, str))


_ATTENTIONS = frozenset(_instructions(kind) for kind in (LlamaAttention, MistralAttention, Qwen2Attention))
_MLPS = frozenset([_instructions(LlamaMLP)])
