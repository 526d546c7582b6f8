"""How long a job may run, as its configuration or SLURM says."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rollout.job import time_limit as module
from rollout.job.time_limit import TimeLimit, time_limit

SLURM = {"SLURM_JOB_ID": "7"}
Squeue = Callable[[str], Path]


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Squeue:
    """Put a program named squeue on the path; returns the file with the arguments that it was called with."""

    def put(script: str) -> Path:
        program, called = tmp_path / "squeue", tmp_path / "called"
        program.write_text(f'#!/bin/sh\necho "$@" > {called}\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return called

    return put


def test_there_is_no_limit_outside_of_slurm() -> None:
    assert time_limit(None, {}) is None


def test_deadline_of_the_configuration_comes_first(squeue: Squeue) -> None:
    called = squeue("echo 10:00")
    assert time_limit("1h30m", SLURM | {"SLURM_JOB_END_TIME": "5"}) == TimeLimit(5400, "job.deadline")
    assert not called.exists()


def test_end_time_is_that_of_the_wall_clock(squeue: Squeue) -> None:
    called = squeue("echo 10:00")
    limit = time_limit(None, SLURM | {"SLURM_JOB_END_TIME": str(int(time.time()) + 600)})
    assert limit is not None
    assert 598 <= limit.seconds <= 600
    assert limit.name == "SLURM's time limit"
    assert not called.exists()


@pytest.mark.parametrize(
    ("said", "seconds"), [("0:45", 45), ("30:00", 1800), ("1:00:05", 3605), ("2-03:00:00", 183600), ("UNLIMITED", None)]
)
def test_squeue_says_how_much_is_left(
    squeue: Squeue, said: str, seconds: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    called = squeue(f"echo {said}")
    assert time_limit(None, SLURM) == (None if seconds is None else TimeLimit(seconds, "SLURM's time limit"))
    assert called.read_text() == "-h -j 7 -o %L\n"
    assert caplog.text == ""


def test_task_of_an_array_asks_for_itself(squeue: Squeue) -> None:
    called = squeue("echo 1:00")
    time_limit(None, SLURM | {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"})
    assert "-j 5_3 " in called.read_text()


@pytest.mark.parametrize("script", ["echo INVALID", "echo slow; exit 1", "exec sleep 5", ""])
def test_job_goes_on_where_squeue_cannot_say(
    squeue: Squeue, script: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    squeue(script)
    monkeypatch.setattr(module, "_SQUEUE_SECONDS", 1.0)
    with caplog.at_level(logging.WARNING):
        assert time_limit(None, SLURM) is None
    assert "The end of SLURM job 7 is unknown" in caplog.text


def test_job_goes_on_without_squeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert time_limit(None, SLURM) is None
    assert "No such file or directory: 'squeue'" in caplog.text
