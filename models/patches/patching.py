"""Replace the forward methods of modules for a while, in one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

from torch import nn

_in_force: ContextVar[bool] = ContextVar("rollout_patched_forwards", default=False)


@contextmanager
def patched(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace the forwards of modules by these functions inside the block; other threads get the modules' own.

    A forward that the caller patches, before the block or inside it, takes precedence and stays in place afterwards. A
    copy of a module that another thread makes meanwhile runs the copy's own forward.
    """
    replaced: list[tuple[nn.Module, Callable[..., Any]]] = []
    token = _in_force.set(True)
    try:
        for module, function in forwards:
            if "forward" not in vars(module):
                forward = _in_this_thread(module, function)
                replaced.append((module, forward))
                vars(module)["forward"] = forward  # as an assignment would, at a tenth of its time
        yield
    finally:
        for module, forward in replaced:
            if vars(module).get("forward") is forward:
                del module.forward
        _in_force.reset(token)


def in_force() -> bool:
    """Return whether this thread is inside `patched`."""
    return _in_force.get()


def _in_this_thread(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that calls the function in threads inside `patched`, and the module's own in others."""
    own = type(module).forward

    def forward(held_by: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if held_by is module and _in_force.get() else own(held_by, *args, **kwargs)

    # A method, since a deep copy of it is a method of the copied module.
    return MethodType(forward, module)
