"""The topology of a process: ranks of a launch, tasks of an array."""

from __future__ import annotations

from typing import Any

import pytest

from rollout.job import ranks as ranks_module
from rollout.job.ranks import Ranks, Topology
from rollout.job.stop_signals import Stopped

#: What SLURM 22.05 sets in the shell of a batch script of three tasks, and in the second task that srun starts there.
BATCH = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "3", "SLURM_NPROCS": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
ARRAY = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_ID": "5"}


def test_single_process_is_its_own_worker() -> None:
    topology = Topology.from_environment({})
    assert (topology.rank, topology.world_size, topology.workers, topology.worker) == (0, 1, 1, 0)
    assert Ranks(topology).broadcast("x") == "x"


def test_rank_of_a_launch_is_a_worker() -> None:
    topology = Topology.from_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert (topology.rank, topology.workers, topology.worker) == (3, 4, 3)
    assert topology.local_world_size == 2


def test_ranks_of_array_tasks_are_numbered_without_gaps() -> None:
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_STEP": "5"}
    workers = [
        Topology.from_environment({**array, "SLURM_ARRAY_TASK_ID": task, "WORLD_SIZE": "2", "RANK": rank}).worker
        for task in ("10", "15", "20")
        for rank in ("0", "1")
    ]
    assert workers == [0, 1, 2, 3, 4, 5]
    assert Topology.from_environment({**array, "SLURM_ARRAY_TASK_ID": "15", "WORLD_SIZE": "2"}).workers == 6


@pytest.mark.parametrize(
    ("environment", "worker", "workers"),
    [
        # srun starts three processes, each by itself.
        (STEP, 1, 3),
        # Three tasks were asked for, but the batch script started the process itself.
        (BATCH, 0, 1),
        # `srun --pty bash` on an allocation of three tasks.
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 0, 1),
        ({**STEP, **ARRAY}, 4, 6),
        # The array is a sweep: each task has a run of its own.
        ({**STEP, **ARRAY, "SUBMITIT_EXECUTOR": "slurm"}, 1, 3),
        # Each task starts two ranks with torchrun by itself.
        ({**STEP, "WORLD_SIZE": "2", "RANK": "1", "GROUP_WORLD_SIZE": "1"}, 3, 6),
        # The tasks start six ranks together, two on each machine.
        ({**STEP, "WORLD_SIZE": "6", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "3"}, 3, 6),
        # The script sets torch's variables itself.
        ({**STEP, "WORLD_SIZE": "3", "RANK": "1"}, 1, 3),
        # One torchrun over three machines that SLURM knows nothing of.
        ({**BATCH, "WORLD_SIZE": "6", "RANK": "4", "GROUP_WORLD_SIZE": "3"}, 4, 6),
    ],
)
def test_tasks_of_a_step_are_workers_of_one_run(environment: dict[str, str], worker: int, workers: int) -> None:
    topology = Topology.from_environment(environment)
    assert (topology.worker, topology.workers) == (worker, workers)


def test_tensor_parallel_launches_of_a_step_are_one_worker_each() -> None:
    launched = {**STEP, "WORLD_SIZE": "2", "RANK": "1", "GROUP_WORLD_SIZE": "1"}
    topology = Topology.from_environment(launched, tensor_parallel=True)
    assert (topology.worker, topology.workers, topology.rank) == (1, 3, 1)


def test_what_stops_a_rank_first_is_what_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import HashStore

    store: Any = HashStore()
    monkeypatch.setattr(ranks_module, "_store", lambda: store)
    ranks = Ranks(Topology.from_environment({}))
    ranks._state = object()
    assert ranks.announced_stop() is None
    ranks.announce_stop("SIGTERM")
    with pytest.raises(Stopped), ranks.stopping_together():
        raise Stopped
    assert ranks.announced_stop() == "SIGTERM"
