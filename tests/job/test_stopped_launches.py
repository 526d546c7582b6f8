"""A signal to the ranks of one launch, or to one of them alone: all end with status 75, and nothing is lost."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rollout.config.compose import load_config
from rollout.job.heartbeat_thread import beating
from rollout.job.job import run_job
from rollout.job.stop_signals import Stopped
from rollout.run_dir.claims import Place, ShardClaims
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import read_run
from rollout.run_dir.workers import Heartbeat, Worker, Workers
from rollout.verify import verify
from tests.job.test_stopped_jobs import stored, until
from tests.support.forks import Forked, ranks
from tests.support.jobs import JOB, FakeEngine, config_of, load_fake, read_records, without_attempt

PARALLEL = "model.tensor_parallel=true"


def ended(processes: list[Forked], seconds: float) -> list[str]:
    """Wait for all to end with status 75; return what each has said."""
    end = time.monotonic() + seconds
    said = []
    for process in processes:
        told, errors = process.communicate(timeout=max(0.1, end - time.monotonic()))
        assert "Traceback" not in errors, errors
        assert process.returncode == 75, errors
        said.append(told + errors)
    return said


@pytest.mark.parametrize("keys", [(), (PARALLEL,)])
def test_rank_that_is_stopped_while_it_loads(tmp_path: Path, keys: tuple[str, ...]) -> None:
    config_of(tmp_path)
    arguments = (f"model.path={tmp_path / 'model'}", f"output.dir={tmp_path / 'out'}", *JOB, *keys)
    with ranks("tests.support.jobs", *arguments, ROLLOUT_TEST_LOADING="5") as processes:
        for process in processes:
            assert process.stdout.readline() == "loading\n"
        processes[1].send_signal(signal.SIGTERM)
        ended(processes, 60)


@pytest.mark.long
def test_follower_that_is_told_while_rank_0_has_nothing_to_do(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_job(config_of(tmp_path, *JOB, PARALLEL), load_fake(FakeEngine(signal_after=2)))
    run = read_run(RunPaths(tmp_path / "out"))
    other = Worker.of_process(0, 0, {})
    with beating(Heartbeat(run.files, run.paths, other), lease_seconds=8):
        claims = ShardClaims(run.files, run.paths, Workers(run.files, run.paths, other, 8), run.shards, Place())
        while claims.claim() is not None:
            pass
        arguments = (f"model.path={tmp_path / 'model'}", f"output.dir={tmp_path / 'out'}", *JOB, PARALLEL)
        with ranks("tests.support.jobs", *arguments) as processes:
            until(lambda: len(list(run.paths.workers.glob("*.json"))) == 2)
            # Its pauses grow meanwhile.
            time.sleep(4)
            processes[1].send_signal(signal.SIGTERM)
            said = ended(processes, 8)
            assert "Stopped by SIGTERM: " in said[0]
        claims.close()


@pytest.fixture(scope="module")
def keys(model: Path) -> list[str]:
    """What the launches generate: two waves of six samples, whose steps are few and, in the launches, slow."""
    keys = [f"model.path={model}", "model.dtype=float32", "data.limit=6", "sampling.n=2", "output.rows_per_shard=3"]
    return [*keys, "sampling.max_new_tokens=100", "sampling.ignore_eos=true", "batcher.max_rows=6"]


@pytest.fixture(scope="module")
def whole(keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Records of an undisturbed job in one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run_job(load_config([*keys, f"output.dir={out}"]))
    return without_attempt(read_records(out))


@pytest.mark.long
@pytest.mark.parametrize("told", [(0, 1), (1,)])
def test_tensor_parallel_ranks_lose_nothing(
    tmp_path: Path, keys: list[str], whole: list[dict[str, Any]], told: tuple[int, ...]
) -> None:
    out = tmp_path / "out"
    with ranks("tests.support.slowed_job", "0.05", *keys, PARALLEL, f"output.dir={out}") as processes:
        until(lambda: stored(out) or any(process.poll() is not None for process in processes))
        time.sleep(0.5)  # the next six samples get tokens
        for rank in told:
            processes[rank].send_signal(signal.SIGTERM)
        said = ended(processes, 60)
    assert "Stopped by SIGTERM: " in said[0]
    assert "6 under way are saved" in said[0], said[0]
    run_job(load_config([*keys, f"output.dir={out}"]))
    records = without_attempt(read_records(out))
    assert [record["completion_ids"] for record in records] == [record["completion_ids"] for record in whole]
    assert verify(out).complete
