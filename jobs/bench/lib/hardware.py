"""What the figures were taken on, and what else the machine did meanwhile: the largest error of all."""

from __future__ import annotations

import os
import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""Those, as Linux names them, that decide which products are fast."""

QUIET = 0.05
"""Share of the CPU time that other processes may use, or the hypervisor take, before a run is flagged as noisy."""


def hardware() -> dict[str, Any]:
    """The machine, for the record."""
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
    """What disturbed one run."""

    load_average: float
    """Over the minute before the start. It still counts the run before this one, so it flags nothing by itself."""
    stolen: float
    """Share of the machine's CPU time that the hypervisor gave to others."""
    others: float
    """Share of it that other processes used, now or in the second before the start, whichever is more."""

    @property
    def noisy(self) -> bool:
        return max(self.stolen, self.others) > QUIET


class Watch:
    """Measures the noise between its making and `noise`; it first looks on for ``pause`` seconds.

    The CPU time of child processes that ended in between counts as the run's own.
    """

    def __init__(self, pause: float = 1.0) -> None:
        self._load = os.getloadavg()[0]
        total, busy, _ = _cpu_seconds()
        time.sleep(pause)
        self._start = _cpu_seconds()
        self._children = _children_seconds()
        self._before = _share(self._start[1] - busy, self._start[0] - total)

    def noise(self) -> Noise:
        """What disturbed the run that ends now."""
        total, busy, stolen = (now - then for now, then in zip(_cpu_seconds(), self._start, strict=True))
        during = _share(busy - (_children_seconds() - self._children), total)
        return Noise(self._load, _share(stolen, total), max(self._before, during))


def _share(part: float, total: float) -> float:
    return max(0.0, part / total) if total > 0 else 0.0


def _cpu_seconds() -> tuple[float, float, float]:
    """CPU time of the whole machine: in all, used by any process, and stolen."""
    times = psutil.cpu_times()
    stolen = getattr(times, "steal", 0.0)
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Guests are counted in `user` and `nice` too.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total, total - idle - stolen, stolen


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
