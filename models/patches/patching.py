"""Forwards of modules that others take the place of for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def patched(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Modules compute by these functions inside the block.

    A module whose forward its owner has patched by then, or patches meanwhile, goes by that, and keeps it afterwards.
    """
    set_here: list[tuple[nn.Module, Callable[..., Any]]] = []
    try:
        for module, function in forwards:
            if "forward" not in vars(module):
                module.forward = function
                set_here.append((module, function))
        yield
    finally:
        for module, function in set_here:
            if vars(module).get("forward") is function:
                del module.forward
