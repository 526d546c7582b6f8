"""The compiled attention kernel's library: its structures, entry points, and the addresses of a pool's slabs.

The structures mirror those of ``csrc/attention_call.h``, field by field.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import Structure, c_double, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rollout.models.arrays import IntArray
from rollout.models.csrc.build import address_of
from rollout.models.csrc.threads import parallel
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.page_pool import PagePool

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _fields(kind: type[ctypes._SimpleCData[Any]], names: str) -> list[tuple[str, type[ctypes._SimpleCData[Any]]]]:
    return [(name, kind) for name in names.split()]


class CBatch(Structure):
    """The sequences of one forward, and their pages."""

    _fields_ = _fields(c_int64, "sequences width page_size slab_pages slabs tokens") + _fields(
        c_void_p, "page_tables prefix_lens query_lens offsets slot_mapping"
    )


class CLayer(Structure):
    """An attention layer: shapes, mask, and the addresses of its keys and values."""

    _fields_ = _fields(c_int64, "dtype kv_heads group key_dim value_dim mask_kind mask_size") + _fields(
        c_void_p, "keys values"
    )


class CTask(Structure):
    """Queries, heads and chunks of one sequence; Python uses only its size."""

    _fields_ = _fields(c_int64, "sequence query queries head heads chunk chunks split partial cost")


class CSizes(Structure):
    """Memory that a plan needs."""

    _fields_ = _fields(c_int64, "tasks splits partial_floats scratch_floats")


class CPlan(Structure):
    """The work of a layer, divided into tasks."""

    _fields_ = [
        ("tasks", c_void_p),
        ("pending", c_void_p),
        ("partials", c_void_p),
        ("scratch", c_void_p),
        ("sizes", CSizes),
    ]


class CCall(Structure):
    """One call of the kernel."""

    _fields_ = (
        _fields(c_void_p, "batch layer plan query key value out")
        + _fields(c_int64, "query_token query_head key_token key_head value_token value_head")
        + _fields(c_void_p, "sinks")
        + _fields(c_double, "scale softcap")
        + _fields(c_int64, "threads")
        + _fields(c_void_p, "parallel")
    )


@dataclass(frozen=True, slots=True)
class Addresses:
    """Addresses of a pool's slabs, valid until the pool grows or shrinks."""

    slabs: tuple[int, ...]
    """Address of each slab's first keys, 0 for a dropped slab; identifies the state of the pool."""
    bases: IntArray
    """[layers, 2, slabs] addresses of keys and values; the structures of ``layers`` point into it."""
    layers: dict[tuple[int, int], CLayer]
    """By layer index and query heads per key head."""
    calls: dict[tuple[int, int], CCall]
    """By the same key; filled again for every call."""


class Kernel:
    """The entry points of a loaded library.

    Args:
        library: compiled from ``paged_attention.c``.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.prepare = library.rollout_prepare
        self.prepare.argtypes, self.prepare.restype = [c_void_p], None
        self.plan = library.rollout_plan
        self.plan.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p]
        self.plan.restype = c_int64
        self.attend = library.rollout_attend
        self.attend.argtypes, self.attend.restype = [c_void_p], None
        self.write_token = address_of(library.rollout_write_token)
        """Address of a function that writes keys and values of one token, for kernels whose threads run already."""
        self.run_tasks = address_of(library.rollout_run_attention)
        """Address of a function that takes tasks of a plan until none is left, likewise."""
        library.rollout_has_float16.restype = c_int64
        self.dtypes = frozenset(
            dtype for dtype in DTYPES if dtype != torch.float16 or bool(library.rollout_has_float16())
        )
        self.parallel = parallel()
        # By the pool's id, with a reference that runs no code when the pool dies. That of a WeakKeyDictionary does, and
        # Python drops an interrupt that arrives there.
        self._addresses: dict[int, tuple[weakref.ref[PagePool], Addresses]] = {}

    def supports(self, layout: KVLayout, device: torch.device) -> bool:
        """Return whether the kernel supports this layout on this device."""
        return device.type == "cpu" and layout.dtype in self.dtypes and bool(layout.layers)

    def addresses(self, pool: PagePool) -> Addresses:
        """Return the addresses of the pool's slabs, looked up again after it grew or shrank."""
        slabs = tuple(0 if slab is None else slab.keys[0].data_ptr() for slab in pool.slabs)
        reference, known = self._addresses.get(id(pool), (None, None))
        if reference is None or known is None or reference() is not pool or known.slabs != slabs:
            bases = np.zeros((len(pool.layout.layers), 2, len(slabs)), np.int64)
            for number, slab in enumerate(pool.slabs):
                if slab is not None:
                    bases[:, 0, number] = [keys.data_ptr() for keys in slab.keys]
                    bases[:, 1, number] = [values.data_ptr() for values in slab.values]
            known = Addresses(slabs=slabs, bases=bases, layers={}, calls={})
            alive = {number: held for number, held in self._addresses.items() if held[0]() is not None}
            self._addresses = {**alive, id(pool): (weakref.ref(pool), known)}
        return known
