"""Two processes with the real engine, one of them slowed: samples that pass from one to the other keep their tokens."""

from __future__ import annotations

import re
from pathlib import Path

from rollout.config.compose import load_config
from rollout.job.job import run_job
from rollout.verify import verify
from tests.support.forks import Forked, start
from tests.support.jobs import read_records, without_attempt

COUNT = 2


def start_task(task: int, seconds: float, keys: list[str]) -> Forked:
    array = {"SLURM_ARRAY_TASK_COUNT": str(COUNT), "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_ID": str(task)}
    return start("tests.support.slowed_job", str(seconds), *keys, **array)


def test_samples_that_migrate_keep_their_tokens(tmp_path: Path, model: Path) -> None:
    keys = [f"model.path={model}", "model.dtype=float32", "data.limit=8", "sampling.n=2", "job.lease_seconds=8"]
    keys += ["sampling.max_new_tokens=200", "sampling.ignore_eos=true"]
    out = tmp_path / "out"
    workers = [start_task(0, 0.1, [*keys, f"output.dir={out}"]), start_task(1, 0.0, [*keys, f"output.dir={out}"])]
    outputs = [worker.communicate(timeout=150) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    handed = [int(count) for count in re.findall(r"Handing (\d+) samples", outputs[0][1])]
    assert sum(handed) > 0, outputs[0][1]
    run_job(load_config([*keys, f"output.dir={tmp_path / 'whole'}"]))
    records, whole = (without_attempt(read_records(folder)) for folder in (out, tmp_path / "whole"))
    tokens = ("row_id", "sample", "prompt_ids", "completion_ids", "text", "finish_reason")
    assert [[r[name] for name in tokens] for r in records] == [[r[name] for name in tokens] for r in whole]
    assert verify(out).complete
