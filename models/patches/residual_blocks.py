"""Forwards of llama-like MLPs and decoder layers on a GPU with fewer launches between the matrix products.

A sum with the norm that follows it, and an activation with its product, are one launch each. Submodules are called as
their family does, so adapters and hooks of the linear layers keep working. Only modules whose forward has the same
bytecode as one below are replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from rollout.models.patches.llama_blocks import HOOKS, MLPS, bytecode
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


def fused_layer(module: Any, norm: Norm | None, kernel: BlockKernel) -> Forward | None:
    """Return a forward of a decoder layer that adds and norms at once before the MLP; None for others.

    Args:
        norm: the fused forward of the norm before the MLP, None if there is none.
    """
    if norm is None or not _is_known(module, LAYERS) or not _runs_alone(module.post_attention_layernorm, patched=True):
        return None

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:  # the family's layers name all other arguments
            out: torch.Tensor = type(module).forward(module, hidden_states, *args, **kwargs)
            return out
        attended, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **kwargs)
        if hidden_states.dtype == attended.dtype == norm.factors.dtype and hidden_states.shape == attended.shape:
            residual, normed = kernel.add_norm(hidden_states, attended, norm.factors, norm.eps, norm.late)
        else:
            residual = hidden_states + attended
            normed = module.post_attention_layernorm(residual)
        summed: torch.Tensor = residual + module.mlp(normed)
        return summed

    return forward


def _is_known(module: nn.Module, known: frozenset[object]) -> bool:
    """Return whether a module runs the forward of its class, and that is one of the known."""
    return "forward" not in vars(module) and bytecode(type(module)) in known


def _runs_alone(module: nn.Module, *, patched: bool = False) -> bool:
    """Return whether a call of a module runs its forward and no hook; a patched forward may be the engine's own."""
    hooked = _has_any_global_hook() or any(getattr(module, hooks) for hooks in HOOKS)
    return not hooked and (patched or "forward" not in vars(module))
