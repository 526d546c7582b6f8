"""Several workers on one run, and kills at any time."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

from rollout.errors import Exit
from rollout.job.job import run_job
from rollout.run_dir.metrics import read_metrics
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import read_run
from rollout.verify import verify
from tests.support.forks import Forked, output_of_ranks, start
from tests.support.jobs import EXPECTED, JOB, FakeEngine, config_of, load_fake, read_records, without_attempt


def start_job(folder: Path, delay: float, **environment: str) -> Forked:
    arguments = [f"model.path={folder / 'model'}", f"output.dir={folder / 'out'}", *JOB]
    return start("tests.support.jobs", *arguments, ROLLOUT_TEST_DELAY=str(delay), **environment)


def test_workers_on_one_folder_share_the_work(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    config = config_of(tmp_path, *JOB)
    engines = [FakeEngine(delay=0.01) for _ in range(3)]
    statuses: list[Exit] = []
    workers = [
        threading.Thread(target=lambda engine=engine: statuses.append(run_job(config, load_fake(engine))))  # type: ignore[misc]
        for engine in engines
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert statuses == [Exit.COMPLETE] * 3
    assert sorted(row for engine in engines for row in engine.asked) == EXPECTED
    assert sum(bool(engine.asked) for engine in engines) >= 2
    assert without_attempt(read_records(tmp_path / "out")) == without_attempt(uninterrupted)
    assert not (tmp_path / "out" / "work").exists()


def test_array_tasks_on_one_folder_share_the_work(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    config_of(tmp_path)
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0"}
    workers = [start_job(tmp_path, 0.02, **array, SLURM_ARRAY_TASK_ID=str(task)) for task in range(2)]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert without_attempt(read_records(tmp_path / "out")) == without_attempt(uninterrupted)
    assert verify(tmp_path / "out").complete
    # Two tasks: shards of ceil(20 / 16) rows, and metrics of their own.
    assert read_run(RunPaths(tmp_path / "out")).rows_per_shard == 2
    assert {line["worker"] for line in read_metrics(RunPaths(tmp_path / "out"))} == {0, 1}


def test_survivor_finishes_the_shards_of_a_dead_worker(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    config_of(tmp_path)
    doomed = start_job(tmp_path, 0.2)
    paths = RunPaths(tmp_path / "out")
    _until(lambda: _finished(paths) >= 2)
    survivor = start_job(tmp_path, 0.0)
    _until(lambda: len(list(paths.shards.glob("*.json"))) >= 3)
    doomed.send_signal(signal.SIGKILL)
    assert doomed.wait() == -signal.SIGKILL
    output = survivor.communicate(timeout=300)
    assert survivor.returncode == 0, output
    doomed.communicate()
    assert without_attempt(read_records(tmp_path / "out")) == without_attempt(uninterrupted)
    assert verify(tmp_path / "out").complete


def test_job_killed_at_any_time_resumes(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    config_of(tmp_path)
    paths = RunPaths(tmp_path / "out")
    kept = 0
    for _ in range(4):
        process = start_job(tmp_path, 0.02)
        wanted = min(kept + rng.randint(1, 15), 59)
        _until(lambda: _finished(paths) >= wanted)  # noqa: B023
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        assert _finished(paths) >= kept, "a kill lost what was finished"
        kept = _finished(paths)
        if rng.random() < 0.5:
            _tear(paths, rng)
            kept = _finished(paths)
    process = start_job(tmp_path, 0.0)
    output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert without_attempt(read_records(tmp_path / "out")) == without_attempt(uninterrupted)
    assert verify(tmp_path / "out").complete


def _finished(paths: RunPaths) -> int:
    """Samples that are on disk: in committed shards, or in whole lines of part files."""
    committed = [json.loads(path.read_text()) for path in paths.shards.glob("*.json")]
    done = {manifest["shard"] for manifest in committed}
    parts = [path for path in paths.work.glob("parts/*/*.jsonl") if int(path.parent.name) not in done]
    return sum(m["samples"] for m in committed) + sum(_lines(path) for path in parts)


def _lines(path: Path) -> int:
    try:
        return max(0, path.read_bytes().count(b"\n") - 1)  # without the header
    except FileNotFoundError:
        # Committed since.
        return 0


def _tear(paths: RunPaths, rng: random.Random) -> None:
    """What a power cut may do to files that were not synced."""
    for path in paths.work.glob("parts/*/*.jsonl"):
        content = path.read_bytes()
        path.write_bytes(content[: rng.randint(0, len(content))] + b"\0" * rng.randint(0, 50))


def _until(true: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.03)


def test_ranks_of_one_launch_share_the_work(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    config_of(tmp_path)
    arguments = [f"model.path={tmp_path / 'model'}", f"output.dir={tmp_path / 'out'}", *JOB]
    launch = ["--standalone", "--nproc_per_node", "2", "-m", "tests.support.jobs"]
    launched = start("torch.distributed.run", *launch, *arguments, ROLLOUT_TEST_DELAY="0.05", OMP_NUM_THREADS="1")
    told, errors = launched.communicate(timeout=300)
    assert launched.returncode == 0, errors
    # The second time there is nothing to do, and no line is added.
    for said in (told, output_of_ranks("tests.support.jobs", *arguments)):
        assert said.count("20, 60 samples") == 1
        assert without_attempt(read_records(tmp_path / "out")) == without_attempt(uninterrupted)
        assert {line["worker"] for line in read_metrics(RunPaths(tmp_path / "out"))} == {0, 1}
    assert read_run(RunPaths(tmp_path / "out")).attempt == 0
