"""Replace an attribute that all threads share for as long as any of them needs it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class _Replacement:
    owner: Any
    """Held, so that its id stays its own."""
    own: Any
    new: Any
    users: int = 0


_lock = threading.Lock()
_replacements: dict[tuple[int, str], _Replacement] = {}


@contextmanager
def replaced(owner: Any, name: str, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute of a class or Python module inside the block.

    The first of several threads makes the replacement, the last puts the attribute back. So a replacement must tell
    by a context variable whether it is meant for the thread that uses it. A value that somebody else sets stays.

    Args:
        replacement: makes the new value of the present one.
    """
    key = (id(owner), name)
    with _lock:
        entry = _replacements.get(key)
        if entry is None:
            own = vars(owner)[name]
            entry = _replacements[key] = _Replacement(owner, own, replacement(own))
            setattr(owner, name, entry.new)
        entry.users += 1
    try:
        yield
    finally:
        with _lock:
            entry.users -= 1
            if not entry.users:
                del _replacements[key]
                if vars(owner).get(name) is entry.new:
                    setattr(owner, name, entry.own)
