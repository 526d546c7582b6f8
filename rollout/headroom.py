"""Device memory that may still be taken: read from the driver or the kernel, never assumed."""

from __future__ import annotations

import functools
import logging
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import pynvml
import torch

from rollout.cgroups import MEMBERSHIP, MOUNT, cgroups
from rollout.errors import InputError

logger = logging.getLogger(__name__)


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
    return parts[0][0] if len(parts) == 1 else SpreadHeadroom(parts, reserve_fraction)


class SpreadHeadroom:
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


@dataclass
class FakeHeadroom:
    """A device made of numbers, for tests and for squeezing a job.

    ``taken_bytes`` is what others use, to be set at will; ``held`` returns what the code under test holds.
    """

    total_bytes: int
    taken_bytes: int = 0
    held: Callable[[], int] = lambda: 0

    def free_bytes(self) -> int:
        return self.total_bytes - self.taken_bytes - self.held()


class HostHeadroom:
    """Host memory: the tightest of what the kernel calls available and the limits of the cgroups around us.

    The small files of ``/proc`` and ``/sys`` that say so take a tenth of a millisecond and more to read, so they are
    read at most every ``refresh_s`` seconds. What this process takes in between is known from its resident memory at
    once, only others are seen late.

    Args:
        membership: the file that names this process's cgroups.
        mount: where cgroups are mounted.
        refresh_s: seconds for which an answer is believed.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        membership: Path = MEMBERSHIP,
        mount: Path = MOUNT,
        refresh_s: float = 0.05,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._refresh_s, self._clock = refresh_s, clock
        self._read_at = -float("inf")
        self._without_us = 0
        self._cgroups = tuple(_memory_cgroups(membership, mount))
        limits = [limit for cgroup in self._cgroups if (limit := cgroup.limit_bytes()) is not None]
        self._total = min([int(psutil.virtual_memory().total), *limits])

    @property
    def total_bytes(self) -> int:
        return self._total

    def free_bytes(self) -> int:
        resident, now = _resident_bytes(), self._clock()
        if now - self._read_at >= self._refresh_s:
            self._without_us, self._read_at = self._read() + resident, now
        return self._without_us - resident

    def _read(self) -> int:
        free = [cgroup_free for cgroup in self._cgroups if (cgroup_free := cgroup.free_bytes()) is not None]
        return min([int(psutil.virtual_memory().available), *free])


def _resident_bytes() -> int:
    """Physical memory of this process."""
    pages = int(_read(Path("/proc/self/statm")).split()[1])
    return pages * resource.getpagesize()


@dataclass(frozen=True, slots=True)
class _CgroupFiles:
    """Names of a cgroup version's files and of the counters in its ``memory.stat``."""

    limits: tuple[str, ...]
    usage: str
    file_cache: tuple[str, str]
    mapped: str


# memory.high does not kill, but a process above it is slowed down until it is below.
_V2 = _CgroupFiles(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file"), "file_mapped")
# In version 1 only the counters with total_ include cgroups below, as the usage does.
_V1 = _CgroupFiles(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
    "total_mapped_file",
)
# Version 1 says "no limit" with the largest number of whole pages in 63 bits.
_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class _Cgroup:
    """One cgroup that accounts for memory. It may be gone or unreadable at any read; then it limits nothing."""

    folder: Path
    files: _CgroupFiles

    def limit_bytes(self) -> int | None:
        limits = [_read_bytes(self.folder / name) for name in self.files.limits]
        return min((limit for limit in limits if limit is not None and limit < _UNLIMITED), default=None)

    def free_bytes(self) -> int | None:
        limit = self.limit_bytes()
        if limit is None:
            return None
        usage = _read_bytes(self.folder / self.files.usage)
        return None if usage is None else limit - usage + self._reclaimable_bytes()

    def _reclaimable_bytes(self) -> int:
        """File cache that the kernel drops before it refuses an allocation.

        Mapped files are left out: weights that are read through a map would have to be read again.
        """
        try:
            lines = _read(self.folder / "memory.stat").splitlines()
        except OSError:
            return 0
        counters = dict(line.split(" ", 1) for line in lines)
        cache = sum(int(counters.get(name, 0)) for name in self.files.file_cache)
        return max(0, cache - int(counters.get(self.files.mapped, 0)))


def _memory_cgroups(membership: Path, mount: Path) -> Iterator[_Cgroup]:
    """Those that account for memory, innermost first."""
    for cgroup in cgroups("memory", membership, mount):
        files = _V2 if cgroup.version == 2 else _V1
        if (cgroup.folder / files.usage).is_file():
            yield _Cgroup(cgroup.folder, files)


def _read(path: Path) -> str:
    # At each step of a decode loop: Path.read_text() takes twice as long.
    with open(path, "rb", buffering=0) as file:
        return file.read().decode()


def _read_bytes(path: Path) -> int | None:
    try:
        return int(_read(path))
    except (OSError, ValueError):  # "max" is no number
        return None


class CudaHeadroom:
    """Memory of one CUDA device: what all processes leave of it, and what torch caches but does not use.

    The driver is asked at most every ``refresh_s`` seconds, since a question to it can take longer than a
    small decode step. What this process allocates in between is known from torch's allocator at once, so
    only other processes are seen late:

        free = total - (driver's used bytes - torch's reserved bytes, both then) - torch's allocated bytes, now

    Cached blocks count as free although they may be in pieces; an allocation can still fail.

    Args:
        device: a CUDA device, in torch's numbering.
        refresh_s: seconds for which an answer of the driver is believed.
        clock: monotonic seconds.
    """

    def __init__(
        self, device: torch.device, refresh_s: float = 0.05, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._device = device
        self._refresh_s = refresh_s
        self._clock = clock
        self._nvml = _nvml_handle(device)
        self._total = int(torch.cuda.get_device_properties(device).total_memory)
        self._others = 0
        self._read_at = -float("inf")

    @property
    def total_bytes(self) -> int:
        return self._total

    def free_bytes(self) -> int:
        allocated, reserved = self._torch_bytes()
        now = self._clock()
        if now - self._read_at >= self._refresh_s:
            self._others = self._total - self._driver_free_bytes() - reserved
            self._read_at = now
        return self._total - self._others - allocated

    def _torch_bytes(self) -> tuple[int, int]:
        """Bytes that torch's allocator has handed out, and that it holds."""
        # memory_allocated() flattens some hundred counters to return one; the nested form is much cheaper.
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        if not stats:  # nothing was ever allocated
            return 0, 0
        return stats["allocated_bytes"]["all"]["current"], stats["reserved_bytes"]["all"]["current"]

    def _driver_free_bytes(self) -> int:
        # On a slice of a GPU the two differ: NVML may know the whole one, the runtime knows the slice.
        free, _ = torch.cuda.mem_get_info(self._device)
        if self._nvml is not None:
            try:
                free = min(free, int(pynvml.nvmlDeviceGetMemoryInfo(self._nvml).free))
            except pynvml.NVMLError as error:
                self._nvml = None
                _log_without_nvml(str(error))
        return free


def _nvml_handle(device: torch.device) -> Any | None:
    """NVML's handle of a torch device, or None where NVML has none.

    Devices are matched by UUID or PCI address, since NVML does not renumber by CUDA_VISIBLE_DEVICES.
    """
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub leaves the PCI numbers out
    pci = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    failure = "no such device"
    try:
        pynvml.nvmlInit()
        for find, key in (
            (pynvml.nvmlDeviceGetHandleByUUID, f"GPU-{properties.uuid}"),
            (pynvml.nvmlDeviceGetHandleByUUID, f"MIG-{properties.uuid}"),
            (pynvml.nvmlDeviceGetHandleByPciBusId, pci),
        ):
            try:
                return find(key)
            except pynvml.NVMLError as error:
                failure = str(error)
    except pynvml.NVMLError as error:
        failure = str(error)
    _log_without_nvml(failure)
    return None


@functools.cache  # an engine is made for each call of a trainer, but this is news only once
def _log_without_nvml(failure: str) -> None:
    logger.warning("NVML is not available (%s); free GPU memory is read from the CUDA runtime alone.", failure)
