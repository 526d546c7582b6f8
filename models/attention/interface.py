"""The attention function registered with transformers, and the object that serves its calls.

`attend` is registered with transformers' ``AttentionInterface`` under `NAME`. A model whose configuration names it
calls `attend` in every attention layer, which forwards the call to the current forward's `ForwardAttention`, held in a
context variable. No mask function is registered under `NAME`, so transformers builds no mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from rollout.models.errors import UnsupportedModel

NAME = "rollout"
PROBE_NAME = "rollout_probe"
"""Name under which masks are built as well; see `rollout.models.attention.probe`."""

#: Keyword arguments that models pass and that have no effect here: positions are in the batch, mask kinds come from
#: the probe, and generation uses no dropout.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "use_cache", "is_causal", "sliding_window", "output_attentions", "output_hidden_states"}
    | {"output_router_logits", "cache_position", "return_dict", "position_embeddings", "layer_idx", "training"}
)


@dataclass(frozen=True, slots=True)
class ScoreParams:
    """How one call turns scores into weights: ``softmax([softcap(scale * q.k), sinks])``."""

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    """[heads] an extra logit per head that takes weight and adds no value."""


class ForwardAttention(Protocol):
    """Serves the attention calls of one forward."""

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scores: ScoreParams,
    ) -> torch.Tensor:
        """Attend with query [b, heads, t, key_dim] to key, value [b, kv_heads, t, dim] and the KV cache.

        Returns [b, t, heads, value_dim].
        """


_current: ContextVar[ForwardAttention | None] = ContextVar("rollout_attention", default=None)


@contextmanager
def use_attention(attention: ForwardAttention) -> Iterator[None]:
    """Serve attention calls by ``attention`` inside this block."""
    token = _current.set(attention)
    try:
        yield
    finally:
        _current.reset(token)


def current_attention() -> ForwardAttention | None:
    """Return the object that serves attention calls, or None outside of a forward."""
    return _current.get()


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - part of transformers' interface; modules are in eval mode
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Implement transformers' attention interface.

    Raises:
        UnsupportedModel: the model passes an unknown argument.
        RuntimeError: called outside of an engine's step.
    """
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _WITHOUT_EFFECT)
    if unknown:
        raise UnsupportedModel(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention function, "
            "which this engine does not support."
        )
    attention = current_attention()
    if attention is None:
        raise RuntimeError(
            f"{type(module).__name__} called the attention function {NAME!r} outside of an engine's step: set the "
            "model's attention implementation to one of transformers' own."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = ScoreParams(scale=scale, softcap=softcap, sinks=s_aux)
    return attention.attend(module, query, key, value, attention_mask, scores), None


AttentionInterface.register(NAME, attend)
AttentionInterface.register(PROBE_NAME, attend)
