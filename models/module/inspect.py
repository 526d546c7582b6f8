"""What a live module is: the transformers model inside, its device, its names and limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rollout.models.errors import UnsupportedModel


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside of PEFT, DDP or torch.compile wrappers.

    Raises:
        UnsupportedModel: there is none.
    """
    seen: Any = model
    while not isinstance(seen, PreTrainedModel):
        if hasattr(seen, "get_base_model"):  # PEFT
            seen = seen.get_base_model()
        elif isinstance(getattr(seen, "module", None), nn.Module):  # DDP
            seen = seen.module
        elif isinstance(getattr(seen, "_orig_mod", None), nn.Module):  # torch.compile
            seen = seen._orig_mod
        else:
            raise UnsupportedModel(f"{type(model).__name__} is not a transformers model.")
    return seen


def output_device(model: nn.Module) -> torch.device:
    """The device on which token ids are given, and logits come out.

    Of a model whose layers accelerate has placed on several devices, it is that of the last one: accelerate takes ids
    to the first by itself, and brings logits back to where the ids were, which is then where they are computed.
    """
    base = unwrap_model(model)
    device = getattr(getattr(base.get_output_embeddings(), "_hf_hook", None), "execution_device", None)
    return base.device if device is None else torch.device(device)


def family_name(model: nn.Module) -> str:
    """How messages name a model: its class and model type."""
    base = unwrap_model(model)
    return f"{type(base).__name__} (model type {base.config.model_type!r})"


def refuse_recurrent(model: nn.Module) -> None:
    """For tiers that store keys and values alone.

    Raises:
        UnsupportedModel: transformers marks the model as one that keeps other state.
    """
    if getattr(unwrap_model(model), "_is_stateful", False):
        raise UnsupportedModel(f"{family_name(model)} keeps recurrent state besides keys and values.")


def vocabulary_size(model: nn.Module) -> int:
    """Token ids that the model can embed: those below this."""
    embeddings: Any = unwrap_model(model).get_input_embeddings()
    return int(embeddings.weight.shape[0])


def context_limit(config: Any) -> int | None:
    """Most tokens of a sequence, from a transformers configuration; None when it states none.

    With dynamic rotary scaling, what a token stores depends on how long the batch was when it came, once that is
    beyond the original length, so rows end there: their results must not depend on company.
    """
    text = config.get_text_config(decoder=True)
    limits = [getattr(text, "max_position_embeddings", None)]
    for rope in _ropes(getattr(text, "rope_parameters", None)):
        if rope.get("rope_type") == "dynamic":
            original = rope.get("original_max_position_embeddings")
            limits.append(original or getattr(text, "original_max_position_embeddings", None))
    stated = [int(limit) for limit in limits if limit]
    return min(stated) if stated else None


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """Rotary parameters; some configurations nest them by layer type."""
    if isinstance(parameters, Mapping):
        yield parameters
        yield from (value for value in parameters.values() if isinstance(value, Mapping))
