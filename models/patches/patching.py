"""Replace the forward methods of modules for a while, in one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any, NamedTuple, Self

from torch import nn

_in_force: ContextVar[bool] = ContextVar("rollout_patched_forwards", default=False)


class PatchedForward(NamedTuple):
    """A forward that replaces a module's in threads inside `patched`. Make it once: a model is borrowed often."""

    module: nn.Module
    method: MethodType

    @classmethod
    def of(cls, module: nn.Module, function: Callable[..., Any]) -> Self:
        """Make a forward that calls the function in threads inside `patched`, and the module's own in others."""

        def forward(held_by: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if held_by is module and _in_force.get():
                return function(*args, **kwargs)
            return type(held_by).forward(held_by, *args, **kwargs)

        # A method, since a deep copy of it is a method of the copied module.
        return cls(module, MethodType(forward, module))


@contextmanager
def patched(forwards: Iterable[PatchedForward]) -> Iterator[None]:
    """Replace the forwards of modules inside the block; other threads get the modules' own.

    A forward that the caller patches, before the block or inside it, takes precedence and stays in place afterwards. A
    copy of a module that another thread makes meanwhile runs the copy's own forward.
    """
    replaced: list[PatchedForward] = []
    token = _in_force.set(True)
    try:
        for patch in forwards:
            attributes = vars(patch.module)
            if "forward" not in attributes:
                replaced.append(patch)
                attributes["forward"] = patch.method  # as an assignment would, at a tenth of its time
        yield
    finally:
        for module, method in replaced:
            attributes = vars(module)
            if attributes.get("forward") is method:
                del attributes["forward"]
        _in_force.reset(token)


def in_force() -> bool:
    """Return whether this thread is inside `patched`."""
    return _in_force.get()
