"""Device memory that may still be taken: read from the driver or the kernel, never assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from rollout.errors import InputError
from rollout.headroom.cuda import CudaHeadroom
from rollout.headroom.host import HostHeadroom


class Headroom(Protocol):
    """Memory of one device, in bytes."""

    @property
    def total_bytes(self) -> int:
        """All memory that this process could ever have there; does not change."""
        ...

    def free_bytes(self) -> int:
        """What this process may still allocate, before any reserve; below zero when it is over a limit."""
        ...


def after_reserve(memory: Headroom, reserve_fraction: float) -> int:
    """Free bytes less the share of the total that stays free; below zero, it is what has to be given back."""
    return memory.free_bytes() - int(reserve_fraction * memory.total_bytes)


def headroom_for(device: torch.device) -> Headroom:
    """Telemetry of the memory that tensors on ``device`` live in.

    Raises:
        InputError: there is none for this kind of device.
    """
    if device.type == "cpu":
        return HostHeadroom()
    if device.type == "cuda":
        return CudaHeadroom(device)
    raise InputError(f"model.device is {device.type!r}, but memory can only be followed on cpu and cuda.")


def headroom_over(shares: Mapping[torch.device, float], reserve_fraction: float) -> Headroom:
    """Telemetry for a pool of which each device holds a share; of the one device, where there is one.

    Raises:
        InputError: there is none for a device.
    """
    parts = [(headroom_for(device), share) for device, share in shares.items()]
    return parts[0][0] if len(parts) == 1 else MultiDeviceHeadroom(parts, reserve_fraction)


class MultiDeviceHeadroom:
    """Several devices that share a pool: how many bytes of it they have room for together, which the tightest decides.

    Args:
        parts: each device, and its share of the pool's bytes.
        reserve_fraction: share of its total memory that is left free on every device.
    """

    def __init__(self, parts: Sequence[tuple[Headroom, float]], reserve_fraction: float) -> None:
        self._parts = tuple(parts)
        self._reserve_fraction = reserve_fraction

    @property
    def total_bytes(self) -> int:
        return int(min(memory.total_bytes / share for memory, share in self._parts))

    def free_bytes(self) -> int:
        """Above the reserve of the total, exactly what every device has room for above its own."""
        room = min(after_reserve(memory, self._reserve_fraction) / share for memory, share in self._parts)
        return int(room) + int(self._reserve_fraction * self.total_bytes)
