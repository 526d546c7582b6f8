"""Describe the machine and measure the noise of other work on it, the largest source of error."""

from __future__ import annotations

import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""CPU flags, as Linux names them, that decide which products are fast."""

QUIET = 0.05
"""Share of CPU time used by other processes or the hypervisor beyond which a run is flagged as noisy."""


def hardware() -> dict[str, Any]:
    """Describe the machine."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags |= set(value.split())
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
    }


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise during one run."""

    load_average: float
    """Load over the minute before the start; it includes the run before, so it flags nothing by itself."""
    stolen: float
    """Share of CPU time that the hypervisor gave to other machines."""
    others: float
    """Share of CPU time that other processes used, during the run or in the second before it; the larger one."""

    @property
    def noisy(self) -> bool:
        return max(self.stolen, self.others) > QUIET


class Watch:
    """Measure the noise from construction to `noise`, after watching for ``pause`` seconds.

    Args:
        pid: of the process whose CPU time, and that of its descendants, is no noise.
        pause: seconds.
    """

    def __init__(self, pid: int | None, pause: float = 1.0) -> None:
        self._pid = pid
        self._load = os.getloadavg()[0]
        total, busy, _ = _cpu_seconds()
        time.sleep(pause)
        self._start = _cpu_seconds()
        self._own = _family_seconds(pid)
        self._before = _share(self._start[1] - busy, self._start[0] - total)

    def noise(self) -> Noise:
        """Return the noise of the run that ends now."""
        total, busy, stolen = (now - then for now, then in zip(_cpu_seconds(), self._start, strict=True))
        own = _family_seconds(self._pid) - self._own
        return Noise(self._load, _share(stolen, total), max(self._before, _share(busy - own, total)))


def _share(part: float, total: float) -> float:
    return max(0.0, part / total) if total > 0 else 0.0


def _cpu_seconds() -> tuple[float, float, float]:
    """Return the CPU time of the whole machine: total, used and stolen."""
    times = psutil.cpu_times()
    stolen = getattr(times, "steal", 0.0)
    idle = times.idle + getattr(times, "iowait", 0.0)
    # `user` and `nice` already include guests.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total, total - idle - stolen, stolen


def _family_seconds(pid: int | None) -> float:
    """Return the CPU time of a process and its descendants; 0 once it has ended."""
    used = 0.0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                times = each.cpu_times()
                used += times.user + times.system + times.children_user + times.children_system
    return used
