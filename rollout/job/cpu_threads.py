"""Choose the number of CPU threads of a process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rollout.headroom.cgroups import MEMBERSHIP, MOUNT, cgroups

_CPUS = Path("/sys/devices/system/cpu")


def choose_threads(local_ranks: int, environment: Mapping[str, str], cores: int | None = None) -> int | None:
    """Return the number of threads for one process; None if the user has set ``OMP_NUM_THREADS``.

    torch's default counts all CPUs of the machine, even those a container or job may not use, so that threads wait for
    each other; torchrun's default is one thread per rank, which leaves cores idle.

    Args:
        local_ranks: processes of the launch on this machine.
        environment: ``OMP_NUM_THREADS`` in it is the user's choice, unless it is the 1 that torchrun sets. In a SLURM
            job, its variables say which CPUs of the machine are the launch's.
        cores: cores that the local ranks share; counted by default.
    """
    configured = environment.get("OMP_NUM_THREADS")
    set_by_torchrun = configured == "1" and local_ranks > 1 and "TORCHELASTIC_RUN_ID" in environment
    if configured and not set_by_torchrun:
        return None
    if cores is None:
        cores = usable_cores()
    return max(1, min(cores, _slurm_cpus(environment, cores)) // local_ranks)


def _slurm_cpus(environment: Mapping[str, str], otherwise: int) -> int:
    """Return how many CPUs of this machine SLURM gave to this task; many clusters do not bind tasks to theirs."""
    cpus = environment.get("SLURM_CPUS_ON_NODE")
    if cpus is None:
        return otherwise
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "1") if "SLURM_STEP_ID" in environment else "1"
    counts = [count for group in per_node.split(",") for count in _repeated(group)]
    node = int(environment.get("SLURM_NODEID", "0"))
    return int(cpus) // counts[min(node, len(counts) - 1)]


def _repeated(group: str) -> list[int]:
    """Return a number of tasks for each node of a group: ``2(x3)`` is three nodes of two tasks."""
    count, _, times = group.rstrip(")").partition("(x")
    return [int(count)] * int(times or 1)


def usable_cores(membership: Path = MEMBERSHIP, mount: Path = MOUNT, cpus: Path = _CPUS) -> int:
    """Count the physical cores that this process may run on, up to the CPU quota of its cgroups.

    Hardware threads of one core share its arithmetic units, so matrix products gain nothing from the second thread.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    physical = {_physical_core(cpus, cpu) for cpu in allowed}
    return max(1, int(min([len(physical), *_quotas(membership, mount)])))


def _physical_core(cpus: Path, cpu: int) -> str:
    """Return a name for the physical core of a CPU: the list of its hardware threads."""
    try:
        return (cpus / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quotas(membership: Path, mount: Path) -> list[float]:
    """Return the CPU quota of each cgroup that has one, in CPUs."""
    quotas = []
    for cgroup in cgroups("cpu", membership, mount):
        try:
            if cgroup.version == 2:
                quota, period = (cgroup.folder / "cpu.max").read_text().split()
            else:
                quota, period = ((cgroup.folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                quotas.append(int(quota) / int(period))
        except OSError:
            # The root cgroup has no such file.
            continue
    return quotas
