"""Jobs that are stopped by a signal or a deadline lose nothing: the same command goes on where they were."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollout.config.compose import load_config
from rollout.errors import Exit
from rollout.job import stopping
from rollout.job.job import run_job
from rollout.job.stop_signals import SIGNALS, Stopped
from rollout.run_dir.part_file import ShardKey, read_parts
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import read_run
from rollout.verify import verify
from tests.support.forks import start
from tests.support.jobs import JOB, FakeEngine, config_of, load_fake, read_records, without_attempt


def until(true: Callable[[], Any], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.05)


def stored(out: Path) -> list[str]:
    """Lines of part files, and names of committed shards."""
    parts = [line for path in out.glob("work/parts/*/*.jsonl") for line in path.read_text().splitlines()[1:]]
    return [*parts, *(path.name for path in out.glob("shards/*.json"))]


def test_signal_saves_what_is_under_way(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    config_of(tmp_path)
    out = tmp_path / "out"
    arguments = (f"model.path={tmp_path / 'model'}", f"output.dir={out}", *JOB)
    process = start("tests.support.jobs", *arguments, ROLLOUT_TEST_DELAY="0.1")
    until(lambda: len(stored(out)) > 6)
    process.send_signal(signal.SIGUSR1)
    told, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert told.startswith("Stopped by SIGUSR1: ")
    assert told.endswith(f"the same command resumes the run in {out}.\n")
    assert "Traceback" not in errors
    run = read_run(RunPaths(out))
    parts = [read_parts(run.files, run.paths, ShardKey(run.fingerprint.digest, shard)) for shard in range(run.shards)]
    under_way = {key for part in parts for key in part.under_way}
    assert 0 < len(under_way) <= 5
    assert not list(out.glob("work/claims/*"))
    done = run.samples_of(run.committed()) + sum(len(part.finished) for part in parts)
    assert f": {done} of 60 samples are done, and {len(under_way)} under way are saved;" in told
    engine = FakeEngine()
    assert run_job(config_of(tmp_path, *JOB), load_fake(engine)) == Exit.COMPLETE
    assert set(engine.resumed) == under_way
    assert len(engine.asked) == 60 - done
    assert without_attempt(read_records(out)) == without_attempt(uninterrupted)
    assert verify(out).complete


def test_deadline_stops_a_job(
    tmp_path: Path, uninterrupted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_LEAST_SECONDS", 0.1)
    with pytest.raises(Stopped) as stopped:
        run_job(config_of(tmp_path, *JOB, "job.deadline=4"), load_fake(FakeEngine(delay=0.1)))
    assert str(stopped.value.sentence).startswith("Stopped by job.deadline: ")
    assert run_job(config_of(tmp_path, *JOB), load_fake()) == Exit.COMPLETE
    assert without_attempt(read_records(tmp_path / "out")) == without_attempt(uninterrupted)


def test_deadline_that_leaves_no_time_loads_no_model(tmp_path: Path) -> None:
    def load(*_: object) -> Any:
        raise AssertionError("the model was loaded")

    with pytest.raises(Stopped):
        run_job(config_of(tmp_path, *JOB, "job.deadline=1"), load)


def test_rewards_that_wait_for_a_batch_are_stored(tmp_path: Path) -> None:
    """The batch would never fill: what has ended is scored when the job stops."""
    reward = ("reward._target_=tests.job.test_stopped_jobs.lengths", "reward._batch_=1000")
    with pytest.raises(Stopped):
        run_job(config_of(tmp_path, *JOB, *reward), load_fake(FakeEngine(signal_after=7)))
    assert sum('"finish_reason":"abort"' not in line for line in stored(tmp_path / "out")) == 7


def lengths(rows: list[dict[str, Any]], texts: list[str]) -> list[float]:
    return [float(len(text)) for text in texts]


def test_tokens_are_those_of_an_undisturbed_job(tmp_path: Path, model: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    keys = [f"model.path={model}", "model.dtype=float32", "data.limit=9", "sampling.n=2", "output.rows_per_shard=4"]
    keys += ["sampling.max_new_tokens=60", "sampling.ignore_eos=true", "batcher.max_rows=6"]
    out = tmp_path / "out"
    process = start("tests.support.slowed_job", "0.05", *keys, f"output.dir={out}")
    until(lambda: stored(out) or process.poll() is not None)
    # Two steps and more: the next prompts begin alike, so one of them waits for the pages of the first.
    time.sleep(0.1 + rng.random() / 4)
    sent = rng.choice(SIGNALS)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith(f"Stopped by {sent.name}: ")
    assert "6 under way are saved" in last
    run_job(load_config([*keys, f"output.dir={out}"]))
    run_job(load_config([*keys, f"output.dir={tmp_path / 'whole'}"]))
    assert without_attempt(read_records(out)) == without_attempt(read_records(tmp_path / "whole"))
    assert {record["attempt"] for record in read_records(out)} == {0, 1}
    assert verify(out).complete


def test_ranks_of_a_launch_stop_with_the_one_that_is_told(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    config_of(tmp_path)
    out = tmp_path / "out"
    arguments = (f"model.path={tmp_path / 'model'}", f"output.dir={out}", *JOB)
    launch = ("--standalone", "--nproc_per_node", "2", "-m", "tests.support.jobs")
    process = start("torch.distributed.run", *launch, *arguments, ROLLOUT_TEST_DELAY="0.3", OMP_NUM_THREADS="1")
    until(lambda: len(list(out.glob("work/parts/*/*.jsonl"))) >= 2 and len(stored(out)) > 4)
    os.kill(_rank(process.pid, 1), signal.SIGTERM)
    told, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert told.count("Stopped by SIGTERM") == 1, errors
    assert errors.count("exitcode  : 75") == 2, errors
    run_job(config_of(tmp_path, *JOB), load_fake())
    assert without_attempt(read_records(out)) == without_attempt(uninterrupted)


def _rank(launcher: int, rank: int) -> int:
    """Return the process of a rank."""
    for task in Path(f"/proc/{launcher}/task").iterdir():
        for child in (task / "children").read_text().split():
            if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                return int(child)
    raise AssertionError("the rank does not run")
