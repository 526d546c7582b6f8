"""Borrow a live module: switch it to the engine for a while and restore it exactly."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from rollout.models.module.inspect import wrappers
from rollout.models.module.rope import Rotary

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
"""One for each innermost module, held while it is borrowed."""


class BorrowedModule:
    """Switches a module to the engine and back, as often as needed.

    It switches the attention implementation of every configuration in the module and the training flag of every
    submodule, and restores each one by itself, since a trainer may have set them individually. Rotary embeddings that
    depend on length follow the length of each sequence and are restored too.

    A module is borrowed by one thread at a time; others wait, so that each restores what it found.

    Nothing else changes: gradients are off by ``no_grad`` (not ``inference_mode``, whose tensors would stay in rotary
    buffers), no global random generator is read, and the caller's autocast stays in force.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._rotary = Rotary(model)
        self.times_borrowed = 0
        """How often the module was borrowed."""
        *_, self._inner = wrappers(model)
        configs = (getattr(module, "config", None) for module in model.modules())
        self._configs: list[Any] = list(
            {id(config): config for config in configs if hasattr(config, "_attn_implementation_internal")}.values()
        )

    @contextmanager
    def borrow(self, implementation: str | None = None) -> Iterator[None]:
        """Run the block without gradients, in eval mode, and with an attention implementation.

        Args:
            implementation: name in transformers' attention interface; None keeps the module's own.
        """
        with _locks.setdefault(self._inner, threading.RLock()):
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
