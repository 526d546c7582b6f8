"""Arrays of the host, and their way to a device without waiting for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def ceil_div(a: int, b: int) -> int:
    """Return ``a / b`` rounded up."""
    return -(-a // b)


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()


def upload(values: NDArray[Any], tensor: torch.Tensor) -> None:
    """Copies an array to the beginning of a tensor of the same dtype, in the order of the device's current stream.

    The array may be changed at once.
    """
    source = torch.from_numpy(np.ascontiguousarray(values))
    if tensor.is_cuda:
        # Of pinned memory that torch takes back only when the copy is done.
        source = source.pin_memory()
    tensor[: len(source)].copy_(source, non_blocking=True)


def uploaded(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array as a tensor on ``device``, to be used on its current stream.

    On a GPU the array may be changed at once; on a CPU the tensor may share its memory.
    """
    source = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        source = source.pin_memory()
    return source.to(device, non_blocking=True)
