"""Host arrays and their asynchronous copies to a device."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@overload
def ceil_div(a: int, b: int) -> int: ...
@overload
def ceil_div(a: IntArray, b: int) -> IntArray: ...
def ceil_div(a: int | IntArray, b: int) -> int | IntArray:
    """Return ``a / b`` rounded up."""
    return -(-a // b)


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()


def upload(values: NDArray[Any], tensor: torch.Tensor) -> None:
    """Copy an array to the beginning of a tensor of the same dtype, ordered on the device's current stream.

    The array may be changed right after the call.
    """
    source = torch.from_numpy(np.ascontiguousarray(values))
    if tensor.is_cuda:
        # Pinned memory, which torch reuses only after the copy has finished.
        source = source.pin_memory()
    (tensor if source.shape == tensor.shape else tensor[: len(source)]).copy_(source, non_blocking=True)


def uploaded(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return an array as a tensor on ``device``, for use on its current stream.

    On a GPU the array may be changed right after the call; on a CPU the tensor may share its memory.
    """
    source = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        source = source.pin_memory()
    return source.to(device, non_blocking=True)


def version(x: torch.Tensor) -> int:
    """Return the number of in-place changes to a tensor; always 0 for tensors of inference mode, which count none."""
    return 0 if x.is_inference() else x._version
