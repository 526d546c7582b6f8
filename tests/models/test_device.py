"""Self-tests of kernels, and errors for lack of memory."""

from __future__ import annotations

import pytest
import torch

from rollout.models.device import failure_of, is_out_of_memory


def test_failure_of_returns_message_error_or_none() -> None:
    assert failure_of(lambda: None) is None
    assert failure_of(lambda: "it draws other tokens") == "it draws other tokens"
    assert failure_of(lambda: str([][1])) == "IndexError: list index out of range"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), RuntimeError("Triton Error [CUDA]: out of memory"), MemoryError()]
)
def test_failure_of_raises_out_of_memory_errors(error: Exception) -> None:
    def check() -> str | None:
        raise error

    with pytest.raises(type(error)):
        failure_of(check)


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8",
        "CUDA out of memory. Tried to allocate 20.00 MiB.",
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com for more.",
        "CUDA driver error: out of memory",
        "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
        "cudaErrorMemoryAllocation: an allocation failed",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasLtCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "HIP out of memory. Tried to allocate 20.00 MiB.",
    ],
)
def test_lack_of_memory_is_recognised(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ValueError(message))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 294912, Hardware limit: 232448."),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
        RuntimeError("NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"),
        RuntimeError("operation not permitted when stream is capturing"),
    ],
)
def test_other_failures_are_no_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)
