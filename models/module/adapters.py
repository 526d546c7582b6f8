"""Refuse PEFT adapters that do more than change the weights of each token's forward."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rollout.models.errors import UnsupportedModel
from rollout.models.module.inspect import wrappers

#: PEFT types that need more than a token and the tokens before it, with the reason as part of a sentence.
_REASONS = {
    "XLORA": "weighs its experts by the whole sequence of every forward",
    "LILY": "weighs its experts by the whole sequence of every forward",
    "POLY": "needs the id of a task with every forward",
}


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model whose active PEFT adapter cannot be served. A disabled adapter is not refused.

    Raises:
        UnsupportedModel: the adapter is of such a type; the message is one sentence with the remedy.
    """
    for wrapper in wrappers(model):
        if not hasattr(wrapper, "peft_config") or isinstance(wrapper, PreTrainedModel):
            continue
        if getattr(wrapper, "_adapters_disabled", False):
            return
        # An X-LoRA mixes the adapters that PEFT calls active, and is none of them itself.
        mixers = [name for name, config in wrapper.peft_config.items() if _kind(config) == "XLORA"]
        for name in (*mixers, *wrapper.active_adapters):
            reason = why_unsupported(wrapper.peft_config.get(name))
            if reason:
                raise UnsupportedModel(
                    f"The model's active adapter {name!r} {reason}, which this engine does not serve: "
                    "set another adapter active, or call the engine inside model.disable_adapter()."
                )


def why_unsupported(config: Any) -> str:
    """Return the type of an adapter and why it is not served, as the end of a sentence; empty if it is served.

    Args:
        config: a ``PeftConfig``.
    """
    kind = _kind(config)
    if getattr(config, "is_prompt_learning", False):
        return f"is of type {kind} and puts learned tokens or keys before every prompt"
    if getattr(config, "alora_invocation_tokens", None):
        return "is an activated LoRA (alora_invocation_tokens) and changes only the tokens after its invocation"
    return f"is of type {kind} and {_REASONS[kind]}" if kind in _REASONS else ""


def _kind(config: Any) -> str:
    """Return PEFT's name of an adapter's type."""
    return str(getattr(getattr(config, "peft_type", None), "value", ""))
