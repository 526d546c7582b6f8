"""How many CPU threads a process should compute with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rollout.headroom.cgroups import MEMBERSHIP, MOUNT, cgroups

_CPUS = Path("/sys/devices/system/cpu")


def threads(local_ranks: int, environment: Mapping[str, str], cores: int | None = None) -> int | None:
    """Threads for one of ``local_ranks`` processes on this machine; None where the user has chosen.

    torch counts the machine's CPUs, whatever a container or a job may use of them, and torchrun gives each of
    several ranks one thread: the first makes threads wait for each other, the second leaves cores idle.

    Args:
        local_ranks: processes of the launch on this machine.
        environment: where ``OMP_NUM_THREADS`` is the user's choice, unless it is torchrun's own 1.
        cores: of this process and the others together; counted by default.
    """
    chosen = environment.get("OMP_NUM_THREADS")
    launcher_chose = chosen == "1" and local_ranks > 1 and "TORCHELASTIC_RUN_ID" in environment
    if chosen and not launcher_chose:
        return None
    return max(1, (usable_cores() if cores is None else cores) // local_ranks)


def usable_cores(membership: Path = MEMBERSHIP, mount: Path = MOUNT, cpus: Path = _CPUS) -> int:
    """Physical cores that this process may run on, and no more than the CPU time that its cgroups allow.

    Two threads of one core share its arithmetic units, so matrix products gain nothing from the second.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    physical = {_siblings(cpus, cpu) for cpu in allowed}
    return max(1, int(min([len(physical), *_quotas(membership, mount)])))


def _siblings(cpus: Path, cpu: int) -> str:
    """What names the physical core of a CPU."""
    try:
        return (cpus / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quotas(membership: Path, mount: Path) -> list[float]:
    """CPUs' worth of time that each limiting cgroup allows."""
    quotas = []
    for cgroup in cgroups("cpu", membership, mount):
        try:
            if cgroup.version == 2:
                quota, period = (cgroup.folder / "cpu.max").read_text().split()
            else:
                quota, period = ((cgroup.folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                quotas.append(int(quota) / int(period))
        except OSError:  # the root has no such file
            continue
    return quotas
