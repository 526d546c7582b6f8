"""Replace the forward methods of modules for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def patched(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace the forwards of modules by these functions inside the block.

    A forward that the caller patches, before the block or inside it, takes precedence and stays in place afterwards.
    """
    replaced: list[tuple[nn.Module, Callable[..., Any]]] = []
    try:
        for module, function in forwards:
            if "forward" not in vars(module):
                module.forward = function
                replaced.append((module, function))
        yield
    finally:
        for module, function in replaced:
            if vars(module).get("forward") is function:
                del module.forward
