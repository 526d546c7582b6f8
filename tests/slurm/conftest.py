"""One SLURM cluster for the tests, and the jobs that they submit to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rollout.errors import Exit
from rollout.job.job import run_job
from tests.support.jobs import JOB, config_of, load_fake, read_records, without_attempt
from tests.support.saved_models import save_tiny
from tests.support.slurm_cluster import SlurmCluster, missing, slurm_cluster

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if reason := missing():
        pytest.skip(reason)
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Records of the toy job, run without SLURM and undisturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run_job(config_of(folder, *JOB), load_fake()) == Exit.COMPLETE
    return without_attempt(read_records(folder / "out"))


@dataclass(frozen=True)
class Submissions:
    """Batch scripts submitted from a folder, where `python` is another program."""

    cluster: SlurmCluster
    folder: Path

    @property
    def out(self) -> Path:
        """The run's directory."""
        return self.folder / "out"

    def python(self, *lines: str) -> None:
        """Make `python` the shell script of these lines."""
        program = self.folder / "bin" / "python"
        program.parent.mkdir(exist_ok=True)
        program.write_text("\n".join(["#!/bin/bash", *lines, ""]))
        program.chmod(0o755)

    def submit(self, script: str, *options: str, arguments: Sequence[str] = (), **environment: str) -> str:
        """Submit one of jobs/slurm with sbatch's options and the job's arguments; return the job's id."""
        words = ["--cpus-per-task=1", *options, ROOT / "jobs/slurm" / script, f"output.dir={self.out}", *arguments]
        path = f"{self.folder / 'bin'}:{self.cluster.environment['PATH']}"
        return self.cluster.submit(*words, cwd=self.folder, PATH=path, **environment)

    def log(self) -> str:
        """Return all that the jobs printed."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def environments(self) -> list[dict[str, str]]:
        """Return the variables of each process of a toy job."""
        return [
            dict(line.partition("=")[::2] for line in path.read_text().splitlines() if "=" in line)
            for path in sorted(self.folder.glob("environment-*"))
        ]


@pytest.fixture
def submissions(cluster: SlurmCluster, tmp_path: Path) -> Submissions:
    return Submissions(cluster, tmp_path)


@pytest.fixture
def toy(submissions: Submissions) -> Submissions:
    """Submissions whose `python -m rollout` is a toy job of tests.support.jobs, and leaves its variables behind."""
    config_of(submissions.folder)
    submissions.python(
        f'env > "{submissions.folder}/environment-$SLURM_JOB_ID-$SLURM_PROCID-${{SLURM_RESTART_COUNT:-0}}"',
        "shift 2",  # -m rollout
        f'export PYTHONPATH="{ROOT}"',
        f'exec "{sys.executable}" -m tests.support.jobs model.path={submissions.folder}/model {" ".join(JOB)} "$@"',
    )
    return submissions
