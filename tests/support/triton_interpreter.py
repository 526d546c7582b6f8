"""Run Triton kernels without a GPU, by its interpreter on CPU tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.devices import GPU
from tests.support.interpreter_shortcuts import take_shortcuts


def kernels_run_here(patch: pytest.MonkeyPatch) -> torch.device:
    """Prepare Triton kernels to run on the GPU or in the interpreter, and return the device.

    The interpreter's matrix product multiplies the bit patterns of bfloat16 numbers (triton 3.6 to 3.9), and BLAS
    gives a row bits that depend on its position in the matrix. It is replaced by a product that sums in order. The
    interpreter also truncates to bfloat16, where a GPU rounds to nearest; torch's conversion replaces that.
    """
    if GPU is not None:
        return GPU
    from triton.runtime import interpreter

    from rollout.models.attention import triton_kernels

    interpreted = isinstance(triton_kernels.attend, interpreter.InterpretedFunction)
    assert interpreted, "Triton was imported before tests/conftest.py turned its interpreter on"
    handle, bfloat16, float32 = interpreter.TensorHandle, interpreter.tl.bfloat16, interpreter.tl.float32

    def numbers(operand: Any) -> Any:
        if operand.dtype == bfloat16:
            return (operand.data.astype(np.uint32) << 16).view(np.float32)
        return operand.data.astype(np.float32)

    def create_dot(_builder: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
        left, right, result = numbers(a), numbers(b), np.zeros_like(total.data)
        for k in range(left.shape[1]):
            result += left[:, k : k + 1] * right[k : k + 1]
        return handle(result + total.data, float32)

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding(builder: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (bfloat16, float32):
            return handle(numbers(source), float32)
        if kinds != (float32, bfloat16):
            return cast(builder, source, target)
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16).view(torch.int16).numpy()
        return handle(rounded.view(np.uint16), bfloat16)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding)
    take_shortcuts(patch)
    return torch.device("cpu")
