"""The threads that compiled kernels run in: the teams of ``threads.c``.

Where these cannot be built, kernels run in the threads of torch's OpenMP runtime (GNU's, LLVM's and Intel's all export
``GOMP_parallel``), and without OpenMP in torch in one thread.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import CFUNCTYPE, c_uint, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rollout.models.csrc.build import KernelUnavailable, address_of, try_build

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("threads.c")
_WORK = CFUNCTYPE(None, c_void_p)


@dataclass(frozen=True, slots=True)
class EntryPoints:
    """Addresses of the functions that ``threads.h`` describes; None: kernels run in one thread."""

    parallel: int | None
    barrier: int | None


def parallel() -> int | None:
    """Return the address of the function that runs a kernel's work in several threads."""
    return entry_points().parallel


def barrier() -> int | None:
    """Return the address of the barrier for use inside such work."""
    return entry_points().barrier


@cache
def entry_points() -> EntryPoints:
    """Return the entry points, building ``threads.c`` at its first use on this machine."""
    own = try_build(SOURCE, _checked)
    return _of_openmp() if own is None else own


def _checked(library: ctypes.CDLL) -> EntryPoints:
    """Return the entry points of a library after a region of two threads.

    Raises:
        KernelUnavailable: the work did not run.
    """
    calls: list[None] = []
    work = _WORK(lambda _: calls.append(None))
    library.rollout_parallel.argtypes, library.rollout_parallel.restype = [_WORK, c_void_p, c_uint, c_uint], None
    library.rollout_parallel(work, None, 2, 0)
    if len(calls) not in (1, 2):
        raise KernelUnavailable(f"two threads ran a kernel's work {len(calls)} times.")
    return _addresses(library.rollout_parallel, library.rollout_barrier)


def _of_openmp() -> EntryPoints:
    """Return the entry points of torch's OpenMP runtime, if there is one."""
    if torch.backends.openmp.is_available():
        try:
            # Already loaded; symbols are looked up in this library and in those it is linked with.
            library = ctypes.CDLL(torch._C.__file__)
            return _addresses(library.GOMP_parallel, library.GOMP_barrier)
        except (OSError, AttributeError):
            logger.debug("torch's OpenMP runtime has no GOMP_parallel; compiled kernels run in one thread.")
    return EntryPoints(None, None)


def _addresses(run: Any, wait: Any) -> EntryPoints:
    return EntryPoints(address_of(run), address_of(wait))
