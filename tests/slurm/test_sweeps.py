"""A sweep whose jobs SLURM runs, by `hydra/launcher=slurm`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rollout.run_dir.metrics import read_metrics
from rollout.run_dir.paths import RunPaths
from rollout.verify import verify
from tests.support.slurm_cluster import SlurmCluster

pytest.importorskip("submitit")
pytestmark = pytest.mark.long


def start_sweep(cluster: SlurmCluster, folder: Path, model: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a sweep on a tiny model, whose jobs write to `runs/0`, `runs/1` and so on."""
    command = [sys.executable, "-m", "rollout", "-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=2"]
    job = [f"model.path={model}", "output.dir=runs/${hydra:job.num}", "hydra.sweep.dir=sweep", *arguments]
    return subprocess.Popen(
        [*command, *job],
        cwd=folder,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sweep_returns_the_statuses_of_its_jobs(cluster: SlurmCluster, model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one two"}\n{"prompt": "three"}\n')
    (tmp_path / "torn.jsonl").write_text('{"prompt": "one')
    sweep = start_sweep(cluster, tmp_path, model, "data.path=rows.jsonl,torn.jsonl", "sampling.max_new_tokens=4")
    _, said = sweep.communicate(timeout=300)
    assert sweep.returncode == 2, said
    assert "Job 1 (data.path=torn.jsonl) ended with status 2: " in said
    assert "Job 0" not in said
    assert verify(tmp_path / "runs/0").complete
    # The tasks of the array are no workers of one run.
    assert {line["worker"] for line in read_metrics(RunPaths(tmp_path / "runs/0"))} == {0}


def test_sweep_that_slurm_refuses_says_so(cluster: SlurmCluster, model: Path, tmp_path: Path) -> None:
    sweep = start_sweep(cluster, tmp_path, model, "seed=1,2", "hydra.launcher.partition=none")
    _, said = sweep.communicate(timeout=300)
    assert sweep.returncode == 1
    assert said.splitlines()[-1].startswith(
        "A job of the sweep was not started or was killed (sbatch: error: invalid partition specified: none): "
    )
