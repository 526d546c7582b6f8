"""Fixtures of the tests of the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollout.errors import Exit
from rollout.job.job import run_job
from rollout.run_dir.paths import RunPaths
from tests.support.jobs import config_of, load_fake


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A complete run of 20 samples in four shards, without metrics."""
    config = config_of(tmp_path, "data.limit=10", "sampling.n=2", "output.rows_per_shard=3")
    assert run_job(config, load_fake()) == Exit.COMPLETE
    paths = RunPaths(tmp_path / "out")
    paths.metrics(0).unlink()
    return paths
