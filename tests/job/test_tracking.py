"""Trackers: the numbers of the metrics arrive, and no tracker stops a job."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rollout.errors import Exit, InputError
from rollout.job.job import run_job
from rollout.run_dir.metrics import read_metrics
from rollout.run_dir.paths import RunPaths
from rollout.tracking import trackers
from tests.support.jobs import JOB, config_of, load_fake, refuse_to_load


def test_tensorboard_has_the_numbers_of_the_metrics(tmp_path: Path) -> None:
    assert run_job(config_of(tmp_path, *JOB, "tracker=tensorboard"), load_fake()) == Exit.COMPLETE
    paths = RunPaths(tmp_path / "out")
    events = EventAccumulator(str(paths.trackers / "out"))
    events.Reload()
    lines = list(read_metrics(paths))
    assert [event.value for event in events.Scalars("new_tokens")] == [line["new_tokens"] for line in lines]
    charts = events.Tags()["scalars"]
    assert "finish_reasons/stop" in charts
    assert not [chart for chart in charts if chart.startswith("step_ms_counts")]


def test_tracker_that_fails_is_said_once_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(folder: Path, run_name: str) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(trackers.STARTS, "wandb", refused)  # type: ignore[index]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert run_job(config_of(tmp_path, *JOB, "tracker=wandb"), load_fake()) == Exit.COMPLETE
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["tracker=wandb failed, and the work goes on without it: ConnectionError: no route to host."]


def test_missing_package_is_refused_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^tracker=mlflow needs the package mlflow: pip install 'rollout\[mlflow\]'"):
        run_job(config_of(tmp_path, *JOB, "tracker=mlflow"), refuse_to_load)
