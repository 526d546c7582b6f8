"""Borrow a live module: switch it to the engine for a while and restore it exactly."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from rollout.models.module.attention_choice import AttentionChoice
from rollout.models.module.compiled import without_compiling
from rollout.models.module.inspect import wrappers
from rollout.models.module.rope import Rotary
from rollout.models.module.sharding import ShardedWeights
from rollout.models.module.signals import signals_held

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
"""One for each innermost module, held while it is borrowed."""


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Keep other threads from borrowing a module inside the block, and hold back signals that would interrupt it."""
    with _lock_of(model), signals_held():
        yield


def _new_locks() -> None:
    """Replace the locks in a forked process: threads that hold them do not exist there."""
    _locks.clear()


os.register_at_fork(after_in_child=_new_locks)


def _lock_of(model: nn.Module) -> threading.RLock:
    """Return the lock of a module."""
    *_, inner = wrappers(model)
    return _locks.setdefault(inner, threading.RLock())  # atomic, so that all threads get the same


class BorrowedModule:
    """Switches a module to the engine and back, as often as needed.

    It switches the attention implementation of every configuration in the module, for this thread alone, and the
    training flag of every submodule, and restores each one by itself, since a trainer may have set them individually.
    Rotary embeddings that depend on length follow the length of each sequence and are restored too. Compiled modules
    run as they were written.

    A module is borrowed by one thread at a time; others wait, so that each restores what it found. Signals are held
    back until it is restored (`rollout.models.module.signals`).

    Nothing else changes: gradients are off by ``no_grad`` (not ``inference_mode``, whose tensors would stay in rotary
    buffers), no global random generator is read, and the caller's autocast stays in force.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._rotary = Rotary(model)
        self._attention = AttentionChoice(model)
        self._weights = ShardedWeights(model)
        self.times_borrowed = 0
        """How often the module was borrowed."""

    @contextmanager
    def borrow(self, implementation: str | None = None) -> Iterator[None]:
        """Run the block without gradients, in eval mode, and with an attention implementation.

        Args:
            implementation: name in transformers' attention interface; None keeps the module's own.
        """
        with exclusive(self._model):
            self.times_borrowed += 1
            training = [module for module in _modules(self._model) if module.training]
            try:
                for module in training:
                    _set_training(module, False)
                with (
                    torch.no_grad(),
                    without_compiling(),
                    self._weights.kept(),
                    self._attention.use(implementation, training),
                    self._rotary.applied(),
                ):
                    yield
            finally:
                for module in training:
                    _set_training(module, True)


def _modules(model: nn.Module) -> list[nn.Module]:
    """Return a module and all modules inside it, each once, in a third of the time of ``modules()``."""
    found: list[nn.Module | None] = [model]
    opened: set[nn.Module] = set()
    for module in found:  # grows meanwhile
        if module is not None and (inside := module._modules) and module not in opened:
            opened.add(module)
            found.extend(inside.values())
    return [module for module in dict.fromkeys(found) if module is not None]


def _set_training(module: nn.Module, training: bool) -> None:
    """Set the flag of one module.

    A model is borrowed for every record, so this does not look through the module's parameters and buffers for the
    name, as an assignment would.
    """
    attributes = vars(module)
    if "training" in attributes:
        attributes["training"] = training
    else:  # TorchScript keeps it elsewhere
        module.training = training
