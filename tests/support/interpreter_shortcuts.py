"""Shortcuts through Triton's interpreter (3.6 to 3.9), which spends its time on types of small blocks, not numbers."""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import Any

import numpy as np
import pytest


def take_shortcuts(patch: pytest.MonkeyPatch) -> None:
    """Let the interpreter compute the same in a third of the time."""
    from triton.runtime import interpreter

    _remember_types(patch, interpreter)
    _patch_language_once(patch, interpreter)
    # It would compute each sum and product of integers again in 64 bits, for assertions that are off without `debug`.
    assert not interpreter.interpreter_builder.options.debug
    patch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False))


def _remember_types(patch: pytest.MonkeyPatch, interpreter: Any) -> None:
    """Make a block's type, and what a tensor says of its shape, once; both never change."""
    core, numpy_type, make_block = interpreter.tl.core, interpreter._get_np_dtype, interpreter.tl.block_type.__init__
    make_compatible = interpreter.TritonSemantic.broadcast_impl_value
    numpy_types: dict[str, np.dtype[Any]] = {}
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}

    def numpy_type_of(kind: Any) -> np.dtype[Any]:
        name = kind.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(kind)
        return numpy_types[name]

    def init_block(block: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(core._unwrap_if_constexpr(size) for size in shape)
        key = type(element_ty), element_ty.name, sizes
        if key not in blocks:
            make_block(block, element_ty, shape)
            blocks[key] = dict(block.__dict__)
        block.__dict__.update(blocks[key])

    @cache
    def shape_of(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return core.constexpr(math.prod(sizes)), core.tuple([core.constexpr(size) for size in sizes])

    def init_tensor(tensor: Any, handle: Any, type: Any) -> None:
        tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
        tensor.numel, tensor.shape = shape_of(tuple(type.shape.values) if type.is_block() else ())

    def broadcast(semantic: Any, left: Any, right: Any) -> tuple[Any, Any]:
        return (left, right) if left.shape is right.shape else make_compatible(semantic, left, right)

    patch.setattr(interpreter, "_get_np_dtype", numpy_type_of)
    patch.setattr(core.block_type, "__init__", init_block)
    patch.setattr(core.tensor, "__init__", init_tensor)
    patch.setattr(interpreter.TritonSemantic, "broadcast_impl_value", broadcast)


def _patch_language_once(patch: pytest.MonkeyPatch, interpreter: Any) -> None:
    """Find the language's functions once, and replace them once for a function that kernels call, not at each call."""
    prepared: set[Any] = set()

    @cache
    def builtins_of(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if interpreter.tl.core.is_builtin(member)]

    def patch_builtins(package: Any, *how: Any) -> None:
        for name in builtins_of(package):
            member = getattr(package, name)
            if interpreter.tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, *how)

    def call(function: Any, *arguments: Any, **named: Any) -> Any:
        if function not in prepared:
            interpreter._patch_lang(function.fn)
            prepared.add(function)
        return function.rewrite()(*arguments, **named)

    patch.setattr(interpreter, "_patch_builtin", patch_builtins)
    patch.setattr(interpreter.InterpretedFunction, "__call__", call)
