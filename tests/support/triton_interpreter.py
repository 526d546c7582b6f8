"""Triton without a GPU: its interpreter runs kernels on CPU tensors, where addresses are CPU pointers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.devices import GPU


def kernels_run_here(patch: pytest.MonkeyPatch) -> torch.device:
    """Sees to it that kernels run, and says where: on a GPU, or in the interpreter.

    The interpreter's own matrix product multiplies the bit patterns of bfloat16 numbers (triton 3.6 to 3.9), and BLAS,
    which it calls, gives a row other bits in another place of the matrix. So it gets one that adds up in order. It cuts
    numbers off where they become bfloat16, which a GPU rounds to the nearest; so that is torch's here.
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
        if (source.dtype.scalar, target.scalar) != (float32, bfloat16):
            return cast(builder, source, target)
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16).view(torch.int16).numpy()
        return handle(rounded.view(np.uint16), bfloat16)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding)
    return torch.device("cpu")
