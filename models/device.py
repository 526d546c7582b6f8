"""What a device can do and what its errors mean: memory, half precision, Triton launches, self-tests of kernels."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from rollout.models.errors import clause

#: In errors of a general kind: of torch's allocator on a CPU, the CUDA runtime, Triton's launcher, and of cuBLAS and
#: cuDNN, which take memory of their own when they are first called.
_SAID = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused, or a library that asked the driver for memory without it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)
    )


def failure_of(check: Callable[[], str | None]) -> str | None:
    """What is wrong: what ``check`` says, or the error that it ends with; None if nothing.

    Errors that only say that there was no memory are raised: later there may be some.
    """
    try:
        return check()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return clause(error)


def launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a dtype in hardware.

    For bfloat16 and float16 that takes instructions that many CPUs lack: torch then falls back to code several
    times slower than float32. oneDNN's own answer for x86 is yes from AVX-512 on, also where it has to emulate.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if platform.machine() in ("x86_64", "AMD64"):
        if dtype == torch.bfloat16:
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.cpu._is_amx_fp16_supported()
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, name)())
