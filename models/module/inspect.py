"""A live module on loan: switched to the engine's attention, in eval mode, and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rollout.models.errors import UnsupportedModel
from rollout.models.module.rope import Rotary


def unwrap(model: nn.Module) -> PreTrainedModel:
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


def home(model: nn.Module) -> torch.device:
    """The device on which token ids are given, and logits come out.

    Of a model whose layers accelerate has placed on several devices, it is that of the last one: accelerate takes ids
    to the first by itself, and brings logits back to where the ids were, which is then where they are computed.
    """
    base = unwrap(model)
    device = getattr(getattr(base.get_output_embeddings(), "_hf_hook", None), "execution_device", None)
    return base.device if device is None else torch.device(device)


def family_name(model: nn.Module) -> str:
    """How messages name a model: its class and model type."""
    base = unwrap(model)
    return f"{type(base).__name__} (model type {base.config.model_type!r})"


def refuse_recurrent(model: nn.Module) -> None:
    """For tiers that store keys and values alone.

    Raises:
        UnsupportedModel: transformers marks the model as one that keeps other state.
    """
    if getattr(unwrap(model), "_is_stateful", False):
        raise UnsupportedModel(f"{family_name(model)} keeps recurrent state besides keys and values.")


def vocabulary_size(model: nn.Module) -> int:
    """Token ids that the model can embed: those below this."""
    embeddings: Any = unwrap(model).get_input_embeddings()
    return int(embeddings.weight.shape[0])


class Loan:
    """Switches a module to the engine and back, as often as needed.

    What is switched: the attention implementation of every configuration in the module, and the training
    flag of every submodule. Both are restored one by one, since a trainer may have set them one by one. Rotary
    embeddings that depend on length follow each text's own, and keep nothing of it.
    Nothing else is touched: gradients are off inside by ``no_grad`` (not ``inference_mode``, whose tensors
    would stay in rotary buffers), no global random generator is read, and ambient autocast stays in force.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._rotary = Rotary(model)
        self.count = 0
        """How often the module was lent."""
        self._configs: list[Any] = list(
            {
                id(module.config): module.config
                for module in model.modules()
                if hasattr(getattr(module, "config", None), "_attn_implementation_internal")
            }.values()
        )

    @contextmanager
    def __call__(self, implementation: str | None = None) -> Iterator[None]:
        """No gradients, eval mode, and this attention implementation; the module's own when None."""
        self.count += 1
        training = [module for module in self._model.modules() if module.training]
        implementations = [config._attn_implementation_internal for config in self._configs]
        try:
            for module in training:
                module.training = False
            if implementation is not None:
                for config in self._configs:
                    config._attn_implementation_internal = implementation
            with torch.no_grad(), self._rotary.in_place():
                yield
        finally:
            for config, own in zip(self._configs, implementations, strict=True):
                config._attn_implementation_internal = own
            for module in training:
                module.training = True
