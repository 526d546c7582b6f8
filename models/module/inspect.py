"""Inspect a live module: the transformers model inside it, its device, parameters and limits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rollout.models.errors import UnsupportedModel


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside PEFT, DDP, FSDP or torch.compile wrappers.

    Raises:
        UnsupportedModel: there is no transformers model inside.
    """
    *_, inner = wrappers(model)
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModel(f"{type(model).__name__} is not a transformers model.")
    return inner


def refuse_other_models(model: nn.Module) -> None:
    """Refuse a module that is no causal language model of transformers.

    Raises:
        UnsupportedModel: the message is one sentence with the remedy.
    """
    base = unwrap_model(model)
    if getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{family_name(model)} is an encoder-decoder, and only models that continue their prompt are served: load "
            "a decoder-only model."
        )
    if base.get_output_embeddings() is None:
        raise UnsupportedModel(
            f"{family_name(model)} has no language-modelling head: load it with AutoModelForCausalLM."
        )


def wrappers(model: nn.Module) -> Iterator[Any]:
    """Yield the model and what each wrapper holds: PEFT's, DDP's, FSDP's, torch.compile's; last the innermost."""
    inner: Any = model
    while inner is not None:
        yield inner
        if isinstance(inner, PreTrainedModel):
            return
        if hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
            continue
        # PEFT's models of mixed adapters and their tuners, DDP, torch.compile, FSDP1
        names = ("base_model", "model", "module", "_orig_mod", "_fsdp_wrapped_module")
        held = (inner._modules.get(name) for name in names)
        inner = next((module for module in held if module is not None), None)


def output_device(model: nn.Module) -> torch.device:
    """Return the device to pass token ids on and to receive logits on.

    For a model that accelerate has spread over several devices, this is the device of the last layer: accelerate moves
    the ids to the first layer and the logits back to the device of the ids, which saves copying the logits.
    """
    base = unwrap_model(model)
    device = getattr(getattr(base.get_output_embeddings(), "_hf_hook", None), "execution_device", None)
    return base.device if device is None else torch.device(device)


def family_name(model: nn.Module) -> str:
    """Return the name of a model in messages: its class and model type."""
    base = unwrap_model(model)
    return f"{type(base).__name__} (model type {base.config.model_type!r})"


def refuse_recurrent(model: nn.Module) -> None:
    """Reject recurrent models, for strategies that store only keys and values.

    Raises:
        UnsupportedModel: transformers marks the model as stateful.
    """
    if getattr(unwrap_model(model), "_is_stateful", False):
        raise UnsupportedModel(f"{family_name(model)} keeps recurrent state besides keys and values.")


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Return the parameter names of the transformers model's forward."""
    return frozenset(inspect.signature(unwrap_model(model).forward).parameters)


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of token ids that the model can embed."""
    embeddings: Any = unwrap_model(model).get_input_embeddings()
    return int(embeddings.weight.shape[0])


def logits_size(model: nn.Module) -> int:
    """Return the number of token ids that the model has logits for."""
    head: Any = unwrap_model(model).get_output_embeddings()
    # An adapter may wrap the head; a sharded weight has the shape of its part.
    size = getattr(head, "out_features", None)
    return size if isinstance(size, int) else vocabulary_size(model)


def context_limit(config: Any) -> int | None:
    """Return the maximum tokens of a sequence from a transformers configuration, None if it states no limit.

    With dynamic rotary scaling the limit is the original length. Beyond it, stored keys would depend on the longest
    sequence in the batch, and results must not depend on batch composition.
    """
    text = config.get_text_config(decoder=True)
    limits = [getattr(text, "max_position_embeddings", None)]
    for rope in _ropes(getattr(text, "rope_parameters", None)):
        if rope.get("rope_type") == "dynamic":
            original = rope.get("original_max_position_embeddings")
            limits.append(original or getattr(text, "original_max_position_embeddings", None))
    return min((int(limit) for limit in limits if limit), default=None)


def has_relative_positions(model: nn.Module) -> bool:
    """Return whether a sequence may begin at any position, since only plain rotary embeddings tell positions."""
    text = unwrap_model(model).config.get_text_config(decoder=True)
    ropes = list(_ropes(getattr(text, "rope_parameters", None)))
    kinds = {rope["rope_type"] for rope in ropes if "rope_type" in rope}
    return bool(kinds) and not kinds & {"dynamic", "longrope"} and not getattr(text, "attention_chunk_size", None)


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all rotary parameters; some configurations nest them by layer type."""
    if isinstance(parameters, Mapping):
        yield parameters
        yield from (value for value in parameters.values() if isinstance(value, Mapping))
