"""Calls that are interrupted at any line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def interruptible(function: Callable[[], T]) -> T:
    """Call a function that is interrupted where Python's own compiler expects no exception.

    An exception in the last instructions of an ``except`` block stays the one that is being handled, and would be the
    context of all those of later tests. A generator has a place of its own for it, and takes it along when it ends.
    """

    def inside() -> Iterator[T]:
        yield function()

    return next(inside())
