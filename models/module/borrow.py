"""A live module on loan: switched to the engine's attention, in eval mode, and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rollout.models.module.rope import Rotary


class BorrowedModule:
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
        self.times_borrowed = 0
        """How often the module was lent."""
        self._configs: list[Any] = list(
            {
                id(module.config): module.config
                for module in model.modules()
                if hasattr(getattr(module, "config", None), "_attn_implementation_internal")
            }.values()
        )

    @contextmanager
    def borrow(self, implementation: str | None = None) -> Iterator[None]:
        """No gradients, eval mode, and this attention implementation; the module's own when None."""
        self.times_borrowed += 1
        training = [module for module in self._model.modules() if module.training]
        implementations = [config._attn_implementation_internal for config in self._configs]
        try:
            for module in training:
                module.training = False
            if implementation is not None:
                for config in self._configs:
                    config._attn_implementation_internal = implementation
            with torch.no_grad(), self._rotary.applied():
                yield
        finally:
            for config, own in zip(self._configs, implementations, strict=True):
                config._attn_implementation_internal = own
            for module in training:
                module.training = True
