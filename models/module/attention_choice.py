"""Choose the attention implementation of a module's configurations, for one thread alone.

Modules read it from ``config._attn_implementation``, a property. While a module is borrowed the property gives the
thread that borrowed it another name, and every other thread the configuration's own. No configuration is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rollout.models.module.shared_attribute import replaced

_NAME = "_attn_implementation"


@dataclass(frozen=True, slots=True)
class _Choice:
    """What this thread reads from some configurations."""

    configs: frozenset[int]
    """Their ids."""
    implementation: str | None
    """None: their own."""


_choice: ContextVar[_Choice | None] = ContextVar("rollout_attention_choice", default=None)
_in_eval: dict[int, Sequence[nn.Module]] = {}
"""By the id of a borrowed configuration, the modules whose training flag is off for all threads meanwhile."""


class AttentionChoice:
    """The configurations of a module that name an attention implementation."""

    def __init__(self, model: nn.Module) -> None:
        configs = (getattr(module, "config", None) for module in model.modules())
        self._configs: list[Any] = list(
            {id(config): config for config in configs if hasattr(config, "_attn_implementation_internal")}.values()
        )
        self._ids = frozenset(map(id, self._configs))
        # A family may override the property.
        self._classes = dict.fromkeys(
            next(cls for cls in type(config).__mro__ if _NAME in vars(cls)) for config in self._configs
        )

    @contextmanager
    def use(self, implementation: str | None, in_eval: Sequence[nn.Module]) -> Iterator[None]:
        """Let the configurations name an implementation in this thread, inside the block.

        Args:
            implementation: name in transformers' attention interface; None keeps each configuration's own.
            in_eval: modules whose training flag is off meanwhile. If one of them drops anything out, a training
                forward of another thread is refused, since it would silently train without.
        """
        token = _choice.set(_Choice(self._ids, implementation))
        outer = {key: _in_eval.get(key, ()) for key in self._ids}
        try:
            _in_eval.update({key: in_eval or outer[key] for key in self._ids})
            with ExitStack() as stack:
                for cls in self._classes:
                    stack.enter_context(replaced(cls, _NAME, _per_thread))
                yield
        finally:
            for key, modules in outer.items():
                if modules:
                    _in_eval[key] = modules
                else:
                    _in_eval.pop(key, None)
            _choice.reset(token)


@contextmanager
def use_implementation(implementation: str) -> Iterator[None]:
    """Let the configurations that this thread has borrowed name another implementation inside the block."""
    choice = _choice.get()
    assert choice is not None, "no module is borrowed"
    token = _choice.set(_Choice(choice.configs, implementation))
    try:
        yield
    finally:
        _choice.reset(token)


def _per_thread(own: property) -> property:
    """Return a property that asks for this thread's choice first."""
    assert own.fget is not None
    read = own.fget

    def implementation(config: Any) -> Any:
        choice = _choice.get()
        if choice is not None and id(config) in choice.configs:
            return read(config) if choice.implementation is None else choice.implementation
        if torch.is_grad_enabled() and any(map(drops_out, _in_eval.get(id(config), ()))):
            raise RuntimeError(
                "Another thread generates with this module, which switches its dropout off meanwhile: train and "
                "generate in turns, or set every dropout to 0."
            )
        return read(config)

    return property(implementation, own.fset, own.fdel, own.__doc__)


def drops_out(module: nn.Module) -> bool:
    """Return whether a module drops out in training."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any("dropout" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())
