"""What a module is made of: its submodules, their forwards and hooks, and the settings of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from types import FunctionType
from typing import Any

from torch import nn

#: PEFT's layers have it; which adapter is active, merged or scaled how stands in attributes that are no tensors.
_ADAPTER = "_disable_adapters"
#: What a module holds by name, besides values of tensors.
_HELD = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_SCALARS = (bool, int, float, str, type(None))
_CONTAINERS = (list, tuple, set, frozenset)
#: Attributes of adapters' layers that trainers switch without changing what the layers compute.
_IRRELEVANT = frozenset({"training"})


class ModuleStructure:
    """A module as it was looked at: everything but the values of its tensors.

    Args:
        model: the module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._made_of = _made_of(self._modules)
        self._settings = [(vars(module), settings) for module in self._modules if (settings := dict(_settings(module)))]

    def same_modules(self) -> bool:
        """Return whether all modules still have their children, classes, hooks, and names of tensors."""
        return _made_of(self._modules) == self._made_of

    def other_settings(self) -> frozenset[str]:
        """Return the names of settings that are not as they were: factors; active, merged and disabled adapters."""
        return frozenset(
            name
            for attributes, settings in self._settings
            for name, value in settings.items()
            if attributes.get(name) != value
        )


def _made_of(modules: list[nn.Module]) -> tuple[object, ...]:
    """Return what decides which code the modules run, in lists for all: with hundreds of modules, the calls cost."""
    attributes = [*map(vars, modules)]
    held = [[own[name] for own in attributes] for name in _HELD]
    children = [*chain.from_iterable(own["_modules"].values() for own in attributes)]
    names = [[*chain.from_iterable(dicts)] for dicts in held]
    sizes = [[*map(len, dicts)] for dicts in held]
    hooks = [_functions(hooks) if (hooks := own[name]) else () for own in attributes for name in _HOOKS]
    return [*map(type, modules)], [own.get("forward") for own in attributes], children, names, sizes, hooks


def _functions(hooks: dict[int, Any]) -> tuple[object, ...]:
    """Return what tells hooks from others: their ids, or their code if they are plain functions, made anew or not.

    Hooks that let inputs require gradients are left out. transformers adds one whenever gradient checkpointing is
    switched on, which TRL does in every step.
    """
    return tuple(
        function.__code__ if _is_plain(function) else number
        for number, function in hooks.items()
        if not getattr(function, "__name__", "").startswith("make_inputs_require_grad")
    )


def _is_plain(function: object) -> bool:
    """Return whether a function depends on its code and arguments alone."""
    return isinstance(function, FunctionType) and not (
        function.__closure__ or function.__defaults__ or function.__kwdefaults__
    )


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that scale or switch what a module computes: floats, and of adapters' layers all plain ones.

    Other modules' flags and counters are left out: trainers switch them, and forwards count with them.
    """
    adapter = _ADAPTER in vars(module)
    for name, value in vars(module).items():
        if type(value) is float or (adapter and name not in _IRRELEVANT and _plain(value)):
            yield name, value.copy() if isinstance(value, (dict, list, set)) else value


def _plain(value: object) -> bool:
    """Return whether a value is a number, a text or a flag, or a collection of those."""
    if isinstance(value, dict):
        return all(isinstance(item, _SCALARS) for item in value.values())
    if isinstance(value, _CONTAINERS):
        return all(isinstance(item, _SCALARS) for item in value)
    return isinstance(value, _SCALARS)
