"""Headroom: device memory that may still be allocated, as the driver or the kernel reports it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch

from rollout.errors import InputError
from rollout.headroom.cuda import CudaHeadroom
from rollout.headroom.host import HostHeadroom, limiting_cgroup


class Headroom(Protocol):
    """Memory of one device, in bytes."""

    @property
    def total_bytes(self) -> int:
        """Constant upper bound of the memory that this process can use on the device."""
        ...

    def free_bytes(self) -> int:
        """Return the bytes this process may still allocate, before any reserve; negative when over a limit."""
        ...


def after_reserve(memory: Headroom, reserve_fraction: float) -> int:
    """Return the free bytes above the reserve; if negative, that many bytes must be freed."""
    return memory.free_bytes() - int(reserve_fraction * memory.total_bytes)


def headroom_for(device: torch.device) -> Headroom:
    """Return the headroom of the memory that holds tensors on ``device``.

    Raises:
        InputError: the device is neither a CPU nor a CUDA device.
    """
    if device.type == "cpu":
        return HostHeadroom()
    if device.type == "cuda":
        return CudaHeadroom(device)
    raise InputError(f"model.device is {device.type!r}, but memory can only be followed on cpu and cuda.")


def memory_name(devices: Iterable[torch.device]) -> str:
    """Name the memory of devices; processes of one host share the memory that they name alike.

    Returns:
        ``cpu``, followed by the cgroup that limits the process's memory, if there is one; or the UUIDs of GPUs.
    """
    return " ".join(sorted(_memory_name(device) for device in devices))


def _memory_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return f"{device.type} {limiting_cgroup()}".rstrip()


def headroom_over(shares: Mapping[torch.device, float], reserve_fraction: float) -> Headroom:
    """Return the headroom of a pool spread over devices by the given shares.

    Raises:
        InputError: a device is neither a CPU nor a CUDA device.
    """
    parts = [(headroom_for(device), share) for device, share in shares.items()]
    return parts[0][0] if len(parts) == 1 else MultiDeviceHeadroom(parts, reserve_fraction)


class MultiDeviceHeadroom:
    """Headroom of a pool spread over several devices: the device with the least room per share limits the pool.

    Args:
        parts: each device, and its share of the pool's bytes.
        reserve_fraction: share of its total memory to leave free on every device.
    """

    def __init__(self, parts: Sequence[tuple[Headroom, float]], reserve_fraction: float) -> None:
        self._parts = tuple(parts)
        self._reserve_fraction = reserve_fraction

    @property
    def total_bytes(self) -> int:
        return int(min(memory.total_bytes / share for memory, share in self._parts))

    def free_bytes(self) -> int:
        """Return the pool's free bytes such that `after_reserve` gives what every device has above its own reserve."""
        room = min(after_reserve(memory, self._reserve_fraction) / share for memory, share in self._parts)
        return int(room) + int(self._reserve_fraction * self.total_bytes)
