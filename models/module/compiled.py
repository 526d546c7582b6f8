"""Run a compiled module without its compiled code, and without making torch.compile forget that code.

The engine's forwards have other shapes and another attention than training. Each would be compiled anew, until
torch.compile gives up on the function and runs it eagerly, in training as well.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_users = 0
_stance: Any = None


@contextmanager
def without_compiling() -> Iterator[None]:
    """Run compiled functions as they were written inside the block; nothing is compiled, and no compiled code is lost.

    torch has one stance for all threads. So others run theirs as written too, until the last thread leaves the block.
    """
    global _users, _stance
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        yield
        return
    with _lock:
        if not _users:
            _stance = torch.compiler.set_stance("force_eager")  # in force from here on
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _stance.__exit__(None, None, None)
                _stance = None
