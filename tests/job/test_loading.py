"""What loading a job's model begins before it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rollout.config.compose import load_config
from rollout.data.prompts import read_prompts
from rollout.errors import InputError
from rollout.job.loading import load_engine
from rollout.job.ranks import Topology
from rollout.models.csrc import build


@pytest.mark.parametrize(("device", "has_gpu", "begins"), [("cpu", True, 1), ("auto", False, 1), ("auto", True, 0)])
def test_kernels_are_compiled_where_a_job_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, has_gpu: bool, begins: int
) -> None:
    begun: list[None] = []
    monkeypatch.setattr(build, "begin", lambda: begun.append(None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = load_config(
        [f"output.dir={tmp_path}", f"model.device={device}", f"model.path={tmp_path / 'none'}", "data.limit=1"]
    )
    with pytest.raises(InputError):
        load_engine(config, read_prompts(config.data), Topology.from_environment({}))
    assert len(begun) == begins
