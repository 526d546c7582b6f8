"""Which errors say that there was no memory."""

from __future__ import annotations

import torch

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
