"""The topology of a process: ranks of a launch, tasks of an array."""

from __future__ import annotations

from rollout.job.ranks import Ranks, Topology


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
