"""The one attention function that transformers' modules call, and who answers it.

Registered with transformers' ``AttentionInterface`` under `NAME`. A model whose configuration names it
calls `attend` in every attention layer; the step that is running, held in a context variable,
answers. No mask function is registered under `NAME`, so transformers builds no mask for it.
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

#: Keyword arguments that models pass and that do not change what is computed here: positions are in the
#: step, spans come from the probe, and generation never drops out.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "use_cache", "is_causal", "sliding_window", "output_attentions", "output_hidden_states"}
    | {"output_router_logits", "cache_position", "return_dict", "position_embeddings", "layer_idx", "training"}
)


@dataclass(frozen=True, slots=True)
class ScoreParams:
    """How scores become weights in one call: ``softmax([softcap(scaling * q.k), sinks])``."""

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    """[heads]: one more logit a head, which takes weight and gives no value."""


class ForwardAttention(Protocol):
    """What answers attention calls during one forward."""

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scores: ScoreParams,
    ) -> torch.Tensor:
        """Attention of query [b, heads, t, key_dim] over key, value [b, kv_heads, t, dim] and what is stored.

        Returns [b, t, heads, value_dim].
        """


_step: ContextVar[ForwardAttention | None] = ContextVar("rollout_attention_step", default=None)


@contextmanager
def use_attention(step: ForwardAttention) -> Iterator[None]:
    """Attention calls are answered by ``step`` inside this block."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def current_attention() -> ForwardAttention | None:
    """What answers attention calls now."""
    return _step.get()


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
    """The function of transformers' attention interface.

    Raises:
        UnsupportedModel: the model passes an argument whose meaning is not known here.
        RuntimeError: called outside of an engine's step.
    """
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _WITHOUT_EFFECT)
    if unknown:
        raise UnsupportedModel(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention function, "
            "whose meaning this engine does not know."
        )
    step = _step.get()
    if step is None:
        raise RuntimeError(
            f"{type(module).__name__} called the attention function {NAME!r} outside of an engine's step: "
            "another thread is using the model while it generates."
        )
    scores = ScoreParams(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    return step.attend(module, query, key, value, attention_mask, scores), None


AttentionInterface.register(NAME, attend)
