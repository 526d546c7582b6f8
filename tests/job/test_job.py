"""Jobs on a fake engine: exactly once, through failures, kills and other workers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout.errors import Exit, InputError
from rollout.job.job import run_job
from rollout.job.ranks import Place
from rollout.run_dir.metrics import read_metrics
from rollout.run_dir.part_file import Part
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import read_run
from rollout.verify import verify
from tests.support.jobs import LIVE, FakeEngine, config_of, load_fake, read_records, refuse_to_load, without_attempt

ROOT = Path(__file__).parents[2]
JOB = ("data.limit=20", "sampling.n=3", "output.rows_per_shard=4", "data.id_column=id")


def keys(records: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(record["row_id"], record["sample"]) for record in records]


EXPECTED = [(f"arithmetic-{row:05d}", sample) for row in range(20) for sample in range(3)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run_job(config_of(folder, *JOB), load_fake()) == Exit.COMPLETE
    return read_records(folder / "out")


def test_every_sample_once_in_order(uninterrupted: list[dict[str, Any]]) -> None:
    assert keys(uninterrupted) == EXPECTED


def test_what_a_run_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_job(config_of(tmp_path, *JOB, "reward._target_=rollout.arithmetic.exact_match"), load_fake())
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["metrics", "rows.parquet", "run.json", "shards"]
    assert len(list((out / "shards").iterdir())) == 10
    assert verify(out).complete
    lines = capsys.readouterr().out
    assert "20 rows, 60 samples (3 a row)" in lines
    assert "live batch:  5 to 5 rows" in lines
    assert "mean reward: 0." in lines
    assert f"{out}/shards/*.parquet" in lines
    assert f"python -m rollout.verify {out}" in lines


def test_the_live_batch_does_not_drain_between_shards(tmp_path: Path) -> None:
    engine = FakeEngine()
    run_job(config_of(tmp_path, *JOB), load_fake(engine))
    assert engine.live_counts[: -LIVE + 1] == [LIVE] * (60 - LIVE + 1)


def test_the_stream_is_read_only_as_rows_are_admitted(tmp_path: Path) -> None:
    """A worker that stops must not sit on shards that it has not begun."""
    engine = FakeEngine(fail_after=1)
    with pytest.raises(RuntimeError, match="the engine fails here"):
        run_job(config_of(tmp_path, *JOB), load_fake(engine))
    assert len(engine.asked) == LIVE + 1
    assert len(list((tmp_path / "out" / "work").glob("*.part.jsonl"))) == 1


@pytest.mark.parametrize("records", [0, 1, 11, 12, 13, 40, 59])
def test_a_failed_engine_loses_only_what_was_in_flight(
    tmp_path: Path, uninterrupted: list[dict[str, Any]], records: int
) -> None:
    config = config_of(tmp_path, *JOB)
    with pytest.raises(RuntimeError):
        run_job(config, load_fake(FakeEngine(fail_after=records)))
    engine = FakeEngine()
    assert run_job(config, load_fake(engine)) == Exit.COMPLETE
    assert len(engine.asked) == 60 - records
    assert without_attempt(read_records(tmp_path / "out")) == without_attempt(uninterrupted)
    attempts = Counter(record["attempt"] for record in read_records(tmp_path / "out"))
    assert attempts == {k: v for k, v in {0: records, 1: 60 - records}.items() if v}
    assert verify(tmp_path / "out").complete


def test_a_complete_run_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path, *JOB)
    run_job(config, load_fake())
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    summary = capsys.readouterr().out
    caplog.set_level("INFO")
    assert run_job(config, refuse_to_load) == Exit.COMPLETE
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert capsys.readouterr().out == summary
    assert "complete already" in caplog.text


def test_what_a_kill_after_the_last_commit_left_is_cleared(tmp_path: Path) -> None:
    config = config_of(tmp_path, *JOB)
    run_job(config, load_fake())
    (tmp_path / "out" / "work").mkdir()
    (tmp_path / "out" / "work" / "00000.part.jsonl").write_text("{}")
    assert run_job(config, refuse_to_load) == Exit.COMPLETE
    assert not (tmp_path / "out" / "work").exists()


def test_a_shard_without_its_manifest_is_committed_again(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    config = config_of(tmp_path, *JOB)
    run_job(config, load_fake())
    paths = RunPaths(tmp_path / "out")
    paths.manifest(2).unlink()
    engine = FakeEngine()
    assert run_job(config, load_fake(engine)) == Exit.COMPLETE
    assert sorted(engine.asked) == EXPECTED[24:36]
    assert without_attempt(read_records(paths.root)) == without_attempt(uninterrupted)


def test_a_finished_part_is_committed_without_the_engine(tmp_path: Path) -> None:
    """Killed between the last record of a shard and its commit."""
    config = config_of(tmp_path, *JOB)
    run_job(config, load_fake())
    paths = RunPaths(tmp_path / "out")
    whole = read_records(paths.root)
    paths.manifest(1).unlink()
    part = Part(_made(paths.part(1)))
    for record in whole[12:24]:
        part.append(_record(record))
    part.close()
    engine = FakeEngine()
    assert run_job(config, load_fake(engine)) == Exit.COMPLETE
    assert engine.asked == []
    assert read_records(paths.root) == whole


def _made(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    return path


def _record(values: dict[str, Any]) -> Any:
    from rollout.records import Record

    return Record(**values)


def test_another_batcher_or_partition_may_go_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_job(config_of(tmp_path, *JOB), load_fake(FakeEngine(fail_after=9)))
    config = config_of(tmp_path, *JOB, "batcher=static", "memory.reserve_fraction=0.2", "output.rows_per_shard=7")
    assert run_job(config, load_fake()) == Exit.COMPLETE
    assert keys(read_records(tmp_path / "out")) == EXPECTED
    assert read_run(RunPaths(tmp_path / "out")).rows_per_shard == 4


def test_another_fingerprint_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    run_job(config_of(tmp_path, *JOB), load_fake())
    with pytest.raises(InputError, match=r"seed was 0 and is 1.*choose another folder"):
        run_job(config_of(tmp_path, *JOB, "seed=1"), refuse_to_load)
    with pytest.raises(InputError, match=r"data\.content was"):
        run_job(config_of(tmp_path, "data.limit=19", *JOB[1:]), refuse_to_load)
    config = config_of(tmp_path, *JOB)
    (tmp_path / "model" / "config.json").write_text('{"other": 1}')
    with pytest.raises(InputError, match=r"model\.weights was"):
        run_job(config, refuse_to_load)


def test_an_unwritable_output_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output\.dir=.* cannot be written"):
        run_job(config_of(tmp_path, f"output.dir={tmp_path}/file/out"), refuse_to_load)


def test_a_model_that_fails_to_load_leaves_the_folder_free(tmp_path: Path) -> None:
    """Another model may then be tried with the same output directory."""

    def fail(*arguments: object) -> Any:
        raise InputError("model.path is wrong.")

    with pytest.raises(InputError):
        run_job(config_of(tmp_path, *JOB), fail)
    assert run_job(config_of(tmp_path, *JOB, "seed=5"), load_fake()) == Exit.COMPLETE


def test_a_run_keeps_its_dtype(tmp_path: Path) -> None:
    seen = []

    def load(dtype: str, fail_after: int | None = None) -> Any:
        def loading(config: Any, prompts: Any, place: Place) -> Any:
            seen.append(config.model.dtype)
            return replace(load_fake(FakeEngine(fail_after=fail_after))(config, prompts, place), dtype=dtype)

        return loading

    with pytest.raises(RuntimeError):
        run_job(config_of(tmp_path, *JOB), load("bfloat16", fail_after=2))
    with pytest.raises(InputError, match=r"set model\.dtype=bfloat16"):
        run_job(config_of(tmp_path, *JOB), load("float32"))
    assert run_job(config_of(tmp_path, *JOB), load("bfloat16")) == Exit.COMPLETE
    assert seen == ["auto", "bfloat16", "bfloat16"]


# Error records


def write_rows(folder: Path, *prompts: object) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return f"data.path={folder}/rows.jsonl"


def test_bad_rows_become_error_records_and_the_job_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path, "fine", "", None, 5, "unencodable", [1, 2])
    assert run_job(config_of(tmp_path, data, "sampling.n=2"), load_fake()) == Exit.ERROR_ROWS
    records = read_records(tmp_path / "out")
    assert [record["error_class"] for record in records] == [
        *[""] * 2,
        *["empty_prompt"] * 2,
        *["bad_prompt"] * 6,
        *[""] * 2,
    ]
    assert [record["finish_reason"] == "error" for record in records] == [bool(r["error_class"]) for r in records]
    assert all(bool(record["error"]) == bool(record["error_class"]) for record in records)
    assert all(record["seed"] == 0 for record in records)
    assert "4 rows (bad_prompt 6, empty_prompt 2)" in capsys.readouterr().out
    assert run_job(config_of(tmp_path, data, "sampling.n=2"), refuse_to_load) == Exit.ERROR_ROWS


def test_a_shard_of_bad_rows_alone_is_committed(tmp_path: Path) -> None:
    data = write_rows(tmp_path, "fine", None, "", "fine too")
    config = config_of(tmp_path, data, "output.rows_per_shard=1")
    assert run_job(config, load_fake()) == Exit.ERROR_ROWS
    assert verify(tmp_path / "out").complete


def failing_reward(prompt_row: dict[str, Any], completion_text: str) -> float:
    if prompt_row["id"] == "arithmetic-00003":
        raise ZeroDivisionError("division by zero")
    return float(prompt_row["answer"])


def test_a_reward_that_raises_is_an_error_record(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    config = config_of(tmp_path, *JOB, "reward._target_=tests.job.test_job.failing_reward")
    assert run_job(config, load_fake()) == Exit.ERROR_ROWS
    records = read_records(tmp_path / "out")
    failed = [record for record in records if record["error_class"]]
    assert keys(failed) == EXPECTED[9:12]
    assert {(r["error_class"], r["error"]) for r in failed} == {
        ("reward_failed", "ZeroDivisionError: division by zero")
    }
    assert all((record["reward"] is None) == bool(record["error_class"]) for record in records)
    assert [r["completion_ids"] for r in records] == [r["completion_ids"] for r in uninterrupted]


def test_a_reward_that_cannot_be_imported_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^reward\._target_=no\.such\.reward "):
        run_job(config_of(tmp_path, "reward._target_=no.such.reward"), refuse_to_load)


# Order


class Told(FakeEngine):
    """Remembers what is expected of each request that it reads. Every prompt has token ids of its own."""

    def __init__(self, fail_after: int | None = None) -> None:
        super().__init__(fail_after=fail_after)
        self.told: dict[str, tuple[float | None, int]] = {}

    def encode(self, prompt: Any) -> list[int]:
        super().encode(prompt)
        return list(str(prompt).encode())

    def run(self, requests: Any, **options: Any) -> Any:
        def told() -> Any:
            for request in requests:
                self.told[request.row_id] = request.expected_tokens, request.ahead
                yield request

        return super().run(told(), **options)


def hinted_rows(folder: Path) -> str:
    rows = [{"prompt": f"row {i}", "id": f"r{i}", "tokens": 100.0 * i if i % 4 else None} for i in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={folder}/rows.jsonl"


def test_hints_reach_the_engine_a_shard_at_a_time_and_change_no_record(tmp_path: Path) -> None:
    job = (hinted_rows(tmp_path), "data.id_column=id", "sampling.n=2", "output.rows_per_shard=4")
    plain = Told()
    assert run_job(config_of(tmp_path, *job), load_fake(plain)) == Exit.COMPLETE
    assert set(plain.told.values()) == {(None, 0)}, "nothing is read ahead"
    records = read_records(tmp_path / "out")

    (tmp_path / "out").rename(tmp_path / "plain")
    hinted = Told()
    run_job(config_of(tmp_path, *job, "data.length_hint_column=tokens"), load_fake(hinted))
    assert hinted.told == {f"r{i}": (100.0 * i if i % 4 else None, 3 - i % 4 if i < 8 else 9 - i) for i in range(10)}
    assert read_records(tmp_path / "out") == records


def test_a_run_may_go_on_with_hints(tmp_path: Path) -> None:
    job = (hinted_rows(tmp_path), "data.id_column=id", "sampling.n=2", "output.rows_per_shard=4")
    run_job(config_of(tmp_path, *job), load_fake(Told()))
    records = read_records(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "plain")
    with pytest.raises(RuntimeError):
        run_job(config_of(tmp_path, *job), load_fake(Told(fail_after=5)))
    engine = Told()
    hinted = config_of(tmp_path, *job, "data.length_hint_column=tokens", f"data.lengths_from={tmp_path / 'plain'}")
    assert run_job(hinted, load_fake(engine)) == Exit.COMPLETE
    assert without_attempt(read_records(tmp_path / "out")) == without_attempt(records)
    assert engine.told["r5"][0] == 500.0, "the row's own hint comes first"


def test_lengths_of_a_former_run_are_expected_of_its_prompts(tmp_path: Path) -> None:
    job = (hinted_rows(tmp_path), "data.id_column=id", "sampling.n=2")
    run_job(config_of(tmp_path, *job, "data.limit=6"), load_fake(Told()))
    former = read_records(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "former")
    engine = Told()
    config = config_of(tmp_path, *job, "seed=1", f"data.lengths_from={tmp_path / 'former'}")
    assert run_job(config, load_fake(engine)) == Exit.COMPLETE
    for i in range(10):
        lengths = [len(record["completion_ids"]) for record in former if record["row_id"] == f"r{i}"]
        assert engine.told[f"r{i}"] == (sum(lengths) / 2 if i < 6 else None, 9 - i)


def test_bad_hints_are_refused_before_the_model_loads(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.lengths_from=.* holds no run"):
        run_job(config_of(tmp_path, f"data.lengths_from={tmp_path / 'nowhere'}"), refuse_to_load)
    with pytest.raises(InputError, match=r"^data\.length_hint_column=prompt holds string values"):
        run_job(config_of(tmp_path, "data.length_hint_column=prompt"), refuse_to_load)


# Several workers, and kills


def start(folder: Path, delay: float, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    arguments = [f"model.path={folder / 'model'}", f"output.dir={folder / 'out'}", *JOB, *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.jobs", *arguments],
        cwd=ROOT,
        env={**os.environ, "ROLLOUT_TEST_DELAY": str(delay), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


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


def test_two_processes_on_one_folder(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    config_of(tmp_path)
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0"}
    workers = [start(tmp_path, 0.02, **array, SLURM_ARRAY_TASK_ID=str(task)) for task in range(2)]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert without_attempt(read_records(tmp_path / "out")) == without_attempt(uninterrupted)
    assert verify(tmp_path / "out").complete
    # Two tasks: shards of ceil(20 / 16) rows, and metrics of their own.
    assert read_run(RunPaths(tmp_path / "out")).rows_per_shard == 2
    assert {line["worker"] for line in read_metrics(RunPaths(tmp_path / "out"))} == {0, 1}


def test_the_work_of_a_dead_worker_is_taken_over(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    config_of(tmp_path)
    doomed = start(tmp_path, 0.2)
    paths = RunPaths(tmp_path / "out")
    _until(lambda: _finished(paths) >= 2)
    survivor = start(tmp_path, 0.0)
    _until(lambda: len(list(paths.shards.glob("*.json"))) >= 3)
    doomed.send_signal(signal.SIGKILL)
    assert doomed.wait() == -signal.SIGKILL
    output = survivor.communicate(timeout=120)[0]
    assert survivor.returncode == 0, output
    doomed.communicate()
    assert without_attempt(read_records(tmp_path / "out")) == without_attempt(uninterrupted)
    assert verify(tmp_path / "out").complete


def test_a_job_killed_at_any_time_goes_on(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    config_of(tmp_path)
    paths = RunPaths(tmp_path / "out")
    kept = 0
    for _ in range(4):
        process = start(tmp_path, 0.02)
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
    process = start(tmp_path, 0.0)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert without_attempt(read_records(tmp_path / "out")) == without_attempt(uninterrupted)
    assert verify(tmp_path / "out").complete


def _finished(paths: RunPaths) -> int:
    """Samples that are on disk: in committed shards, or in whole lines of part files."""
    committed = [json.loads(path.read_text()) for path in paths.shards.glob("*.json")]
    done = {manifest["shard"] for manifest in committed}
    parts = [path for path in paths.work.glob("*.part.jsonl") if int(path.name[:5]) not in done]
    return sum(m["samples"] for m in committed) + sum(_lines(path) for path in parts)


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        # Committed since.
        return 0


def _tear(paths: RunPaths, rng: random.Random) -> None:
    """What a power cut may do to files that were not synced."""
    for path in paths.work.glob("*.part.jsonl"):
        content = path.read_bytes()
        path.write_bytes(content[: rng.randint(0, len(content))] + b"\0" * rng.randint(0, 50))


def _until(true: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.01)


def test_ranks_of_one_launch(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    config_of(tmp_path)
    arguments = [f"model.path={tmp_path / 'model'}", f"output.dir={tmp_path / 'out'}", *JOB]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "tests.support.jobs", *arguments]
    environment = {**os.environ, "ROLLOUT_TEST_DELAY": "0.05"}
    for expected_workers in ({0, 1}, {0, 1}):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("20 rows, 60 samples") == 1
        assert without_attempt(read_records(tmp_path / "out")) == without_attempt(uninterrupted)
        # The second time there is nothing to do, and no line is added.
        assert {line["worker"] for line in read_metrics(RunPaths(tmp_path / "out"))} == expected_workers
    assert read_run(RunPaths(tmp_path / "out")).attempt == 0
