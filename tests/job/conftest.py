"""Fixtures of the tests of jobs."""

from __future__ import annotations

from typing import Any

import pytest

from rollout.errors import Exit
from rollout.job.job import run_job
from tests.support.jobs import JOB, config_of, load_fake, read_records


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Records of an uninterrupted job, to compare interrupted ones with."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run_job(config_of(folder, *JOB), load_fake()) == Exit.COMPLETE
    return read_records(folder / "out")
