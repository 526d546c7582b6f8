"""Headroom of host memory, from the kernel and this process's cgroups."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from rollout.headroom.cached_reading import CachedReading
from rollout.headroom.cgroups import MEMBERSHIP, MOUNT, cgroups

_PAGE_BYTES = resource.getpagesize()


class HostHeadroom:
    """Headroom of host memory: the smaller of what the kernel reports as available and the cgroup limits leave.

    Reading ``/proc`` and ``/sys`` takes 0.1 ms or more, so they are read at most every ``refresh_s`` seconds. This
    process's own resident memory is read each time, so only other processes are seen late.

    Args:
        membership: file that lists this process's cgroups.
        mount: where cgroups are mounted.
        refresh_s: seconds between readings.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        membership: Path = MEMBERSHIP,
        mount: Path = MOUNT,
        refresh_s: float = 0.05,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cgroups = tuple(_memory_cgroups(membership, mount))
        limits = [limit for cgroup in self._cgroups if (limit := cgroup.limit_bytes()) is not None]
        self._total = min([int(psutil.virtual_memory().total), *limits])
        self._without_us = CachedReading(self._read_without_us, refresh_s, clock)

    @property
    def total_bytes(self) -> int:
        return self._total

    def free_bytes(self) -> int:
        return self._without_us() - _resident_bytes()

    def _read_without_us(self) -> int:
        """Return the bytes that would be free if this process held no memory."""
        free = [cgroup_free for cgroup in self._cgroups if (cgroup_free := cgroup.free_bytes()) is not None]
        return min([int(psutil.virtual_memory().available), *free]) + _resident_bytes()


def _resident_bytes() -> int:
    """Return the physical memory of this process."""
    # Runs at each step of the decode loop; a Python file takes three times as long.
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        pages = int(os.read(file, 256).split()[1])
    finally:
        os.close(file)
    return pages * _PAGE_BYTES


@dataclass(frozen=True, slots=True)
class _CgroupFiles:
    """File names of a cgroup version, and counter names in its ``memory.stat``."""

    limits: tuple[str, ...]
    usage: str
    file_cache: tuple[str, str]
    mapped: str


# The kernel throttles a process above memory.high, without killing it.
_V2 = _CgroupFiles(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file"), "file_mapped")
# In version 1 only the counters with total_ include cgroups below, as the usage does.
_V1 = _CgroupFiles(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
    "total_mapped_file",
)
# Version 1 encodes "no limit" as the largest number of whole pages in 63 bits.
_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class _Cgroup:
    """One memory cgroup. It may vanish or be unreadable at any time; then it sets no limit."""

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
        """Return the file cache that the kernel drops before it refuses an allocation.

        Mapped files are excluded, since memory-mapped weights would have to be read again.
        """
        try:
            lines = _read(self.folder / "memory.stat").splitlines()
        except OSError:
            return 0
        counters = dict(line.split(" ", 1) for line in lines)
        cache = sum(int(counters.get(name, 0)) for name in self.files.file_cache)
        return max(0, cache - int(counters.get(self.files.mapped, 0)))


def limiting_cgroup(membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> str:
    """Return the path of the innermost cgroup that limits this process's memory; empty if none below the mount does."""
    for cgroup in _memory_cgroups(membership, mount):
        if cgroup.limit_bytes() is not None and cgroup.folder != mount:
            return str(cgroup.folder.relative_to(mount))
    return ""


def _memory_cgroups(membership: Path, mount: Path) -> Iterator[_Cgroup]:
    """Yield the memory cgroups of this process, innermost first."""
    for cgroup in cgroups("memory", membership, mount):
        files = _V2 if cgroup.version == 2 else _V1
        if (cgroup.folder / files.usage).is_file():
            yield _Cgroup(cgroup.folder, files)


def _read(path: Path) -> str:
    # Unbuffered: Path.read_text() takes twice as long.
    with open(path, "rb", buffering=0) as file:
        return file.read().decode()


def _read_bytes(path: Path) -> int | None:
    try:
        return int(_read(path))
    except (OSError, ValueError):  # "max" is not a number
        return None
