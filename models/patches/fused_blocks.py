"""Forwards of llama-like blocks on a GPU with fewer launches between the matrix products.

One launch each: a sum with the norm that follows it, an activation with its product, and the rotation of queries and
keys with the write of keys and values to their pages. Submodules are called as their family does, so adapters and hooks
of the linear layers keep working. Only modules whose forward has the same bytecode as one below are replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from rollout.models.attention.base import RotatingAttention
from rollout.models.attention.interface import ScoreParams, current_attention
from rollout.models.patches.llama_blocks import ATTENTIONS, HEAD_NORMING_ATTENTIONS, HOOKS, MLPS, bytecode
from rollout.models.patches.pointwise import BlockKernel, NormFactors

Forward = Callable[..., Any]

LAYERS = frozenset([bytecode(LlamaDecoderLayer)])
ACTIVATIONS = (SiLUActivation, nn.SiLU)


class Norm(Protocol):
    """The fused forward of a norm, and what it computes with."""

    factors: NormFactors
    eps: float

    @property
    def late(self) -> bool:
        """See `PointwiseKernel.rms_norm`."""
        ...

    def keep(self, x: torch.Tensor, normed: torch.Tensor) -> None:
        """Keep the normed rows of x for the next call, if that gets x as it is now."""


def fused_attention(module: Any) -> Forward | None:
    """Return a forward of an attention module that rotates and writes at once; None for others.

    The module's family must rotate the halves of heads, as `PointwiseKernel.rotate` does.
    """
    if not _is_known(module, ATTENTIONS | HEAD_NORMING_ATTENTIONS):
        return None
    norms_heads = bytecode(type(module)) in HEAD_NORMING_ATTENTIONS
    dim, scores = int(module.head_dim), ScoreParams(float(module.scaling))

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        attention = current_attention()
        tokens = hidden_states.shape[1]
        if (
            not isinstance(attention, RotatingAttention)
            or not attention.rotates
            or len(hidden_states) != 1
            or past_key_values is not None
            or position_embeddings is None
            or any(x.shape != (1, tokens, dim) or x.dtype != attention.layout.dtype for x in position_embeddings)
        ):
            own = type(module).forward
            return own(module, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        cosines, sines = position_embeddings
        layers = (module.q_proj, module.k_proj, module.v_proj)
        q, k, v = (layer(hidden_states).view(1, tokens, -1, dim) for layer in layers)
        if norms_heads:
            q, k = module.q_norm(q), module.k_norm(k)
        q, k, v = (x[0].to(attention.layout.dtype) for x in (q, k, v))
        angles = cosines[0].contiguous(), sines[0].contiguous()
        attended = attention.attend_rotating(module, q, k, v, angles, scores)
        return module.o_proj(attended.view(1, tokens, -1)), None

    return forward


def fused_mlp(module: Any, kernel: BlockKernel) -> Forward | None:
    """Return a forward of a gated MLP with SiLU that computes activation and product at once; None for others."""
    if not _is_known(module, MLPS) or type(module.act_fn) not in ACTIVATIONS or not _runs_alone(module.act_fn):
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        supported = gate.dtype == up.dtype and gate.dtype in kernel.dtypes and gate.shape == up.shape
        inner = kernel.gated_silu(gate, up) if supported else module.act_fn(gate) * up
        out: torch.Tensor = module.down_proj(inner)
        return out

    return forward


def fused_layer(module: Any, norm: Norm | None, next_norm: Norm | None, kernel: BlockKernel) -> Forward | None:
    """Return a forward of a decoder layer that adds and norms at once; None for others.

    Args:
        norm: the fused forward of the norm before the MLP, None if there is none.
        next_norm: that of the norm after the layer, None if there is none. It keeps what this layer computes for it.
    """
    if norm is None or not _is_known(module, LAYERS) or not _runs_alone(module.post_attention_layernorm, patched=True):
        return None

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:  # the family's layers name all other arguments
            out: torch.Tensor = type(module).forward(module, hidden_states, *args, **kwargs)
            return out
        attended, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **kwargs)
        if _fits(norm, hidden_states, attended):
            residual, normed = kernel.add_norm(hidden_states, attended, norm.factors, norm.eps, norm.late)
        else:
            residual = hidden_states + attended
            normed = module.post_attention_layernorm(residual)
        output: torch.Tensor = module.mlp(normed)
        if next_norm is None or not _fits(next_norm, residual, output):
            return residual + output
        summed, normed = kernel.add_norm(residual, output, next_norm.factors, next_norm.eps, next_norm.late)
        next_norm.keep(summed, normed)
        return summed

    return forward


def hands_on(layer: nn.Module, following: nn.Module) -> bool:
    """Return whether the next layer gets a layer's output untouched: hooks may write to it unseen by torch."""
    return not (_has_any_global_hook() or layer._forward_hooks or following._forward_pre_hooks)


def _fits(norm: Norm, x: torch.Tensor, y: torch.Tensor) -> bool:
    """Return whether `BlockKernel.add_norm` can add x and y for a norm."""
    return x.dtype == y.dtype == norm.factors.dtype and x.shape == y.shape


def _is_known(module: nn.Module, known: frozenset[object]) -> bool:
    """Return whether a module runs the forward of its class, and that is one of the known."""
    return "forward" not in vars(module) and bytecode(type(module)) in known


def _runs_alone(module: nn.Module, *, patched: bool = False) -> bool:
    """Return whether a call of a module runs its forward and no hook; a patched forward may be the engine's own."""
    hooked = _has_any_global_hook() or any(getattr(module, hooks) for hooks in HOOKS)
    return not hooked and (patched or "forward" not in vars(module))
