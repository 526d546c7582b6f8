"""The number of CPU threads: limited by affinity and quotas, and shared among local ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rollout.job.cpu_threads import choose_threads, usable_cores

STEP = {"SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "8", "SLURM_NODEID": "0"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("ranks", "environment", "wanted"),
    [
        (1, {}, 12),
        (4, {}, 3),
        (5, {}, 2),
        (16, {}, 1),
        (1, {"OMP_NUM_THREADS": "7"}, None),
        (2, {"OMP_NUM_THREADS": "7"}, None),
        (2, {"OMP_NUM_THREADS": "1"}, None),
        (2, TORCHRUN, 6),
        (1, TORCHRUN, None),
        (2, TORCHRUN | {"OMP_NUM_THREADS": "3"}, None),
        # A job with eight of the machine's CPUs, and steps of it: one task, two on this node, two on this third node.
        (1, {"SLURM_CPUS_ON_NODE": "8"}, 8),
        (1, {"SLURM_CPUS_ON_NODE": "64"}, 12),
        (1, STEP | {"SLURM_STEP_TASKS_PER_NODE": "1"}, 8),
        (1, STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}, 4),
        (2, STEP | {"SLURM_STEP_TASKS_PER_NODE": "1,4,2", "SLURM_NODEID": "2"}, 2),
    ],
)
def test_ranks_share_cores_unless_the_user_chose_threads(
    ranks: int, environment: dict[str, str], wanted: int | None
) -> None:
    assert choose_threads(ranks, environment, cores=12) == wanted


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight CPUs, two to a core, all of them allowed."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for cpu in range(8):
        folder = tmp_path / f"cpus/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    return tmp_path


def cores(machine: Path, membership: str = "") -> int:
    (machine / "cgroup").write_text(membership)
    return usable_cores(machine / "cgroup", machine / "fs", machine / "cpus")


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_hardware_threads_of_a_core_count_once(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores(machine) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4}, raising=False)
    assert cores(machine) == 2


def test_each_cpu_counts_without_topology_files(machine: Path) -> None:
    (machine / "cgroup").write_text("")
    assert usable_cores(machine / "cgroup", machine / "fs", machine / "nowhere") == 8


@pytest.mark.parametrize(("quota", "wanted"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1)])
def test_cgroup_quota_limits_the_cores(machine: Path, quota: str, wanted: int) -> None:
    write(machine / "fs/pod/task", cpu__max=quota)
    write(machine / "fs/pod", cpu__max="max 100000")
    write(machine / "fs")
    assert cores(machine, "0::/pod/task\n") == wanted


def test_tighter_quota_of_an_outer_cgroup_limits_the_cores(machine: Path) -> None:
    write(machine / "fs/pod/task", cpu__max="300000 100000")
    write(machine / "fs/pod", cpu__max="100000 100000")
    assert cores(machine, "0::/pod/task\n") == 1


@pytest.mark.parametrize(("quota", "wanted"), [("-1", 4), ("200000", 2)])
def test_quota_of_cgroups_version_1_limits_the_cores(machine: Path, quota: str, wanted: int) -> None:
    write(machine / "fs/cpu/job", cpu__cfs_quota_us=quota + "\n", cpu__cfs_period_us="100000\n")
    assert cores(machine, "4:cpu,cpuacct:/job\n3:memory:/other\n") == wanted


def test_usable_cores_of_this_machine() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
