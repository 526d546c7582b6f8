"""Fixtures of the tests of jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rollout.errors import Exit
from rollout.job.job import run_job
from tests.support.jobs import JOB, config_of, load_fake, read_records
from tests.support.saved_models import save_words_llama


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Records of an uninterrupted job, to compare interrupted ones with."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run_job(config_of(folder, *JOB), load_fake()) == Exit.COMPLETE
    return read_records(folder / "out")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of random weights, whose completions never end by themselves."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_words_llama(folder, 2048)
    return folder
