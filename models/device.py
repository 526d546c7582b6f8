"""Device helpers: out-of-memory errors, kernel self-tests, Triton launches, half precision on CPUs."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from rollout.models.errors import clause

#: What RuntimeErrors say when memory is short: torch's CPU allocator; the CUDA runtime and driver, through torch and
#: Triton; cuBLAS and cuDNN, which allocate memory of their own at their first call on a stream. cuBLAS says that it is
#: not initialised where its handle did not find the memory it needs.
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory"
    r"|(?:CUDA|HIP)\b.*\bout of memory"
    r"|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|hipErrorOutOfMemory"
    r"|CUBLAS_STATUS_(?:ALLOC_FAILED|NOT_INITIALIZED)"
    r"|CUDNN_STATUS_\w*ALLOC(?:ATION)?_FAILED",
    re.IGNORECASE | re.DOTALL,
)
#: NCCL passes on what CUDA says, but its communicator is broken then, and other ranks wait in it.
_OF_COMMUNICATION = re.compile(r"\bNCCL\b")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocator, or a library that allocates through the driver, ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    message = str(error)
    return (
        isinstance(error, RuntimeError)
        and _OUT_OF_MEMORY.search(message) is not None
        and _OF_COMMUNICATION.search(message) is None
    )


def failure_of(check: Callable[[], str | None]) -> str | None:
    """Run a self-test and return why it failed: its result or its exception; None if it passed.

    Out-of-memory errors are raised, because a later run of the same test may pass.
    """
    try:
        return check()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return clause(error)


def launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` current for a Triton launch, which ignores the device of its arguments."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Return whether this CPU multiplies matrices of a dtype in hardware.

    Many CPUs lack instructions for bfloat16 and float16; torch then runs code several times slower than float32.
    oneDNN reports support on x86 from AVX-512 on, even where it emulates, so it is not asked there.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if platform.machine() in ("x86_64", "AMD64"):
        if dtype == torch.bfloat16:
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.cpu._is_amx_fp16_supported()
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, name)())
