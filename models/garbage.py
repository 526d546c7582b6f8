"""When Python's garbage collector does not run."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_users = 0
"""Blocks that threads are inside of."""
_enabled = False
"""Whether the collector ran before the first of them."""


@contextmanager
def without_collections() -> Iterator[None]:
    """Keep Python's garbage collector from running inside the block, in all threads; blocks may overlap."""
    global _users, _enabled
    with _lock:
        if not _users:
            _enabled = gc.isenabled()
            gc.disable()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users and _enabled:
                gc.enable()
