"""The scripts of jobs/slurm on a real SLURM: with and without GPUs, on several nodes, queued again when interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rollout.run_dir.metrics import read_metrics
from rollout.run_dir.paths import RunPaths
from rollout.verify import verify
from tests.slurm.conftest import ROOT, Submissions
from tests.support.jobs import read_records, without_attempt
from tests.support.slurm_cluster import CPU_NODES, GPU_NODES

#: Begun together, so that one worker starts the cluster, and waits for its jobs while others have much to do.
pytestmark = pytest.mark.long

SCRIPTS = sorted(path.name for path in (ROOT / "jobs/slurm").glob("*.sbatch"))


def workers(out: Path) -> set[int]:
    return {line["worker"] for line in read_metrics(RunPaths(out))}


def committed(out: Path) -> int:
    return len(list((out / "shards").glob("*.json")))


def assert_undisturbed(out: Path, uninterrupted: list[dict[str, Any]]) -> None:
    assert without_attempt(read_records(out)) == uninterrupted
    assert verify(out).complete


def test_array_generates_on_a_cluster_without_gpus(submissions: Submissions, model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"one two {'three ' * row}"}) + "\n" for row in range(12)))
    job = submissions.submit(
        "array.sbatch",
        "--array=0-1",
        arguments=[f"model.path={model}", f"data.path={rows}", "sampling.max_new_tokens=8", "output.rows_per_shard=1"],
    )
    submissions.cluster.finish(job)
    assert verify(submissions.out).complete
    assert len(read_records(submissions.out)) == 12
    assert "Warning: this node has GPUs" not in submissions.log()
    assert {task["NodeList"] for task in submissions.cluster.jobs(job)} <= set(CPU_NODES)


def test_each_task_of_an_array_has_a_gpu_of_its_own(toy: Submissions, uninterrupted: list[dict[str, Any]]) -> None:
    options = ["--partition=gpu", "--gpus-per-task=1", f"--nodelist={GPU_NODES[0]}", "--array=0-1"]
    toy.cluster.finish(toy.submit("array.sbatch", *options, ROLLOUT_TEST_DELAY="0.1"))
    assert {task["CUDA_VISIBLE_DEVICES"] for task in toy.environments()} == {"0", "1"}
    assert "Warning" not in toy.log()
    assert_undisturbed(toy.out, uninterrupted)


def test_job_that_forgot_its_gpu_is_warned(submissions: Submissions) -> None:
    submissions.python("exit 0")
    submissions.cluster.finish(submissions.submit("array.sbatch", "--partition=gpu"))
    assert "Warning: this node has GPUs, and the job asked for none: sbatch --gpus-per-task=1" in submissions.log()


def test_nodes_share_one_run(toy: Submissions, uninterrupted: list[dict[str, Any]]) -> None:
    job = toy.submit("multi_node.sbatch", "--nodes=2", "--cpus-per-task=3", ROLLOUT_TEST_DELAY="0.1")
    toy.cluster.finish(job)
    assert {task["SLURMD_NODENAME"] for task in toy.environments()} == set(CPU_NODES)
    assert workers(toy.out) == {0, 1}
    # srun asked for the CPUs that the batch script has for a task.
    assert {task["SLURM_CPUS_ON_NODE"] for task in toy.environments()} == {"3"}
    assert_undisturbed(toy.out, uninterrupted)


def test_only_processes_that_srun_starts_count_as_workers(submissions: Submissions) -> None:
    place = submissions.folder / "place.py"
    place.write_text(
        "import os; from rollout.job.ranks import Topology\n"
        "place = Topology.from_environment(os.environ)\n"
        "print(f'{place.worker} of {place.workers}\\n', end='')\n"
    )
    script = submissions.folder / "job.sh"
    script.write_text(f"#!/bin/bash\npython {place}\necho srun\nsrun --label python {place}\n")
    job = submissions.cluster.submit("--nodes=2", "--ntasks=3", "--output=x.log", script, cwd=submissions.folder)
    submissions.cluster.finish(job)
    shell, _, step = submissions.log().partition("srun\n")
    assert shell.split("\n") == ["0 of 1", ""]
    assert sorted(step.splitlines()) == ["0: 0 of 3", "1: 1 of 3", "2: 2 of 3"]


def test_processes_of_srun_share_one_run(toy: Submissions, uninterrupted: list[dict[str, Any]]) -> None:
    path = f"{toy.folder / 'bin'}:{toy.cluster.environment['PATH']}"
    command = ["env", f"PATH={path}", "ROLLOUT_TEST_DELAY=0.1", "srun", "--ntasks=2", "python", "-m", "rollout"]
    toy.cluster.call(*command, f"output.dir={toy.out}", cwd=toy.folder)
    assert workers(toy.out) == {0, 1}
    assert_undisturbed(toy.out, uninterrupted)


def test_task_that_is_queued_again_goes_on_where_it_was(toy: Submissions, uninterrupted: list[dict[str, Any]]) -> None:
    job = toy.submit("array.sbatch", "--array=0-1", ROLLOUT_TEST_DELAY="0.3")
    toy.cluster.until(lambda: committed(toy.out) >= 2, "two shards are committed")
    kept = {path.name: path.read_bytes() for path in (toy.out / "shards").iterdir()}
    toy.cluster.call("scontrol", "requeue", f"{job}_0")
    toy.cluster.finish(job)
    assert {task["ArrayTaskId"]: task["Restarts"] for task in toy.cluster.jobs(job)} == {"0": "1", "1": "0"}
    assert {name: (toy.out / "shards" / name).read_bytes() for name in kept} == kept
    assert_undisturbed(toy.out, uninterrupted)


def test_preempted_task_comes_back(toy: Submissions, uninterrupted: list[dict[str, Any]]) -> None:
    cluster = toy.cluster
    options = ["--partition=preemptible", "--exclusive", "--array=3"]
    job = toy.submit("preemptible.sbatch", *options, ROLLOUT_TEST_DELAY="0.2")
    cluster.until(lambda: committed(toy.out) >= 2, "two shards are committed")
    node = cluster.jobs(job)[0]["NodeList"]
    other = cluster.submit("--exclusive", f"--nodelist={node}", "--wrap=sleep 1", cwd=toy.folder)
    cluster.finish(other)
    assert cluster.states(job) != ["COMPLETED"]
    cluster.finish(job)
    assert cluster.jobs(job)[0]["Restarts"] == "1"
    assert "Stopped by SIGUSR1: " in toy.log()
    assert_undisturbed(toy.out, uninterrupted)


def test_warning_reaches_python(submissions: Submissions) -> None:
    cluster, folder = submissions.cluster, submissions.folder
    submissions.python(
        f'said="{folder}/said-$SLURM_JOB_ID"',
        '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || { echo again >> "$said"; exit 0; }',
        "trap 'echo warned >> \"$said\"; exit 75' USR1",
        'echo ready >> "$said"',
        "sleep 100 & wait",
    )
    said = {submissions.submit(script, "--nodes=1"): script for script in SCRIPTS}
    cluster.until(lambda: all((folder / f"said-{job}").exists() for job in said), "the jobs listen")
    # As at a time limit and at preemption: to the steps of the jobs, and not to the scripts' shells.
    cluster.call("scancel", "--signal=USR1", *said)
    for job, script in said.items():
        cluster.finish(job)
        assert (folder / f"said-{job}").read_text().split() == ["ready", "warned", "again"], script


def test_cancelled_job_does_not_come_back(submissions: Submissions) -> None:
    cluster, ready = submissions.cluster, submissions.folder / "ready"
    submissions.python("trap 'exit 75' TERM", f'touch "{ready}"', "sleep 100 & wait")
    jobs = [submissions.submit(script, "--nodes=1") for script in SCRIPTS]
    for job in jobs:
        cluster.wait_for(job, "RUNNING")
    cluster.until(ready.exists, "a job listens")
    cluster.call("scancel", *jobs)
    for job in jobs:
        cluster.finish(job, "CANCELLED")
        assert cluster.jobs(job)[0]["Restarts"] == "0"


def test_only_what_stopped_early_is_queued_again(submissions: Submissions) -> None:
    cluster, lives = submissions.cluster, submissions.folder / "lives"
    submissions.python(
        # A task's first life ends with the status that is its number, its second one well.
        f'echo "$SLURM_ARRAY_TASK_ID $SLURM_PROCID $4" >> "{lives}"',
        '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0',
        '[ "$SLURM_ARRAY_TASK_ID" = 10 ] && kill -USR1 $$',
        'exit "$SLURM_ARRAY_TASK_ID"',
    )
    jobs = {name: submissions.submit(name, "--array=0,1,2,4,10,75", arguments=["seed=7"]) for name in SCRIPTS}
    final = submissions.submit("array.sbatch", "--array=75", arguments=["job.deadline=1h"])
    failed = {status: ("FAILED", f"{status}:0", "0") for status in "124"}
    again = dict.fromkeys(("10", "75"), ("COMPLETED", "0:0", "1"))
    for job in jobs.values():
        cluster.wait_for(job, "COMPLETED", "FAILED")
        ended = {
            task["ArrayTaskId"]: (task["JobState"], task["ExitCode"], task["Restarts"]) for task in cluster.jobs(job)
        }
        assert ended == {"0": ("COMPLETED", "0:0", "0")} | failed | again
    cluster.finish(final, "FAILED")
    # Six tasks, two of which live twice; each is one process, or two where there are two nodes.
    seen = [line.split()[2] for line in lives.read_text().splitlines()]
    assert sorted(seen) == ["job.deadline=1h"] + ["seed=7"] * 8 * (1 + 1 + 2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_need_a_directory(submissions: Submissions, script: str) -> None:
    submissions.python("exit 0")
    path = ROOT / "jobs/slurm" / script
    job = submissions.cluster.submit("--cpus-per-task=1", path, "seed=1", cwd=submissions.folder)
    submissions.cluster.finish(job, "FAILED")
    assert submissions.cluster.jobs(job)[0]["ExitCode"] == "2:0"
    assert "output.dir=DIR" in submissions.log()


def test_scripts_differ_only_in_what_they_ask_for() -> None:
    texts = [(ROOT / "jobs/slurm" / name).read_text() for name in SCRIPTS]
    assert len({text.partition("\nset -euo pipefail\n")[2] for text in texts}) == 1
