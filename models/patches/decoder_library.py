"""The compiled kernel ``decoder_layers.c``: its structures and entry points."""

from __future__ import annotations

import ctypes
from ctypes import Structure, byref, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from rollout.models.attention.compiled import kernel
from rollout.models.attention.compiled_library import Kernel
from rollout.models.csrc.build import try_build
from rollout.models.patches.compiled_products import CompiledProducts, compiled_products

SOURCE = Path(__file__).parents[1] / "csrc" / "decoder_layers.c"


def _fields(kind: type[ctypes._SimpleCData[Any]], names: str) -> list[tuple[str, type[ctypes._SimpleCData[Any]]]]:
    return [(name, kind) for name in names.split()]


class CDecoderLayer(Structure):
    """Addresses of what a layer computes with, and the index of its attention's plan."""

    _fields_ = _fields(c_void_p, "heads output gate_up down norm mlp_norm query_norm key_norm attention") + _fields(
        c_int64, "plan"
    )


class CStack(Structure):
    """One forward through all layers."""

    _fields_ = (
        _fields(c_int64, "dtype layers tokens hidden inner heads kv_heads dim late heads_late")
        + _fields(c_double, "eps heads_eps scale")
        + _fields(c_void_p, "layer last_norm batch plans embedded cosines sines out memory")
        + _fields(c_int64, "threads")
        + _fields(
            c_void_p, "parallel barrier product_tasks product_scratch_bytes product_task write_token run_attention"
        )
    )


class DecoderLibrary:
    """The entry points of a loaded library.

    Args:
        library: compiled from ``decoder_layers.c``.
        attention: attends.
        products: multiplies.
    """

    def __init__(self, library: ctypes.CDLL, attention: Kernel, products: CompiledProducts) -> None:
        self.functions = {
            "product_tasks": products.tasks,
            "product_scratch_bytes": products.scratch_bytes,
            "product_task": products.run_task,
            "write_token": attention.write_token,
            "run_attention": attention.run_tasks,
        }
        """Addresses of functions of other kernels, by field of `CStack`."""
        self._kernels = attention, products
        self._bytes = library.rollout_stack_bytes
        self._bytes.argtypes, self._bytes.restype = [c_void_p], c_int64
        self._run = library.rollout_run_stack
        self._run.argtypes, self._run.restype = [c_void_p], None

    def bytes_needed(self, stack: CStack) -> int:
        """Return the working memory of a forward."""
        size: int = self._bytes(byref(stack))
        return size

    def run(self, stack: CStack) -> None:
        """Run a forward; its memory must be aligned to 64 bytes."""
        self._run(byref(stack))


@cache
def decoder_library() -> DecoderLibrary | None:
    """Return the kernel, building it at its first use on this machine.

    None, with one warning, if that fails, and if the kernels are missing that attend and multiply for it.
    """
    attention, products = kernel(), compiled_products()
    if attention is None or products is None:
        return None
    return try_build(SOURCE, lambda library: DecoderLibrary(library, attention, products))
