"""What takes SLURM minutes: a node that dies, a time limit, a sweep whose job is told to stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rollout.verify import verify
from tests.slurm.conftest import Submissions
from tests.slurm.test_scripts import assert_undisturbed, committed
from tests.slurm.test_sweeps import start_sweep
from tests.support.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.chaos


def test_tasks_of_a_node_that_dies_go_on_elsewhere(toy: Submissions, uninterrupted: list[dict[str, Any]]) -> None:
    cluster = toy.cluster
    job = toy.submit("array.sbatch", "--exclusive", "--array=0-1", ROLLOUT_TEST_DELAY="0.5")
    cluster.until(lambda: committed(toy.out) >= 2, "two shards are committed")
    task = cluster.jobs(job)[0]
    node = task["NodeList"]
    cluster.kill_node(node)
    cluster.call("scontrol", "update", f"nodename={node}", "state=down", "reason=died")
    try:
        cluster.finish(job, seconds=240)
    finally:
        cluster.start_node(node)
        cluster.call("scontrol", "update", f"nodename={node}", "state=resume")
    again = next(other for other in cluster.jobs(job) if other["ArrayTaskId"] == task["ArrayTaskId"])
    assert again["Restarts"] == "1"
    assert again["NodeList"] != node
    assert_undisturbed(toy.out, uninterrupted)


def test_task_whose_time_is_over_comes_back(toy: Submissions, uninterrupted: list[dict[str, Any]]) -> None:
    job = toy.submit("array.sbatch", "--time=1", "--signal=USR1@10", "--array=0", ROLLOUT_TEST_DELAY="1.5")
    toy.cluster.finish(job, seconds=400)
    assert int(toy.cluster.jobs(job)[0]["Restarts"]) >= 1
    assert_undisturbed(toy.out, uninterrupted)


def test_job_of_a_sweep_that_is_told_to_stop_comes_back(cluster: SlurmCluster, model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": "one " * row}) + "\n" for row in range(1, 65)))
    arguments = ["data.path=rows.jsonl", "sampling.n=8", "sampling.max_new_tokens=32", "sampling.ignore_eos=true"]
    arguments += ["batcher.max_rows=8", "output.rows_per_shard=4"]
    sweep = start_sweep(cluster, tmp_path, model, "seed=1,2", *arguments)
    cluster.until(lambda: committed(tmp_path / "runs/1") >= 1, "a shard is committed")
    array = max(cluster.call("squeue", "--noheader", "--format=%A", "--states=running").split(), key=int)
    array = cluster.jobs(array)[0]["ArrayJobId"]
    cluster.call("scancel", "--signal=USR2", f"{array}_1")
    _, said = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, said
    assert {task["ArrayTaskId"]: task["Restarts"] for task in cluster.jobs(array)} == {"0": "0", "1": "1"}
    assert all(verify(tmp_path / f"runs/{job}").complete for job in range(2))
