"""Jobs on a fake engine: every sample exactly once, despite failures, kills and other workers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout.errors import Exit, InputError
from rollout.job.job import run_job
from rollout.job.ranks import Topology
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import read_run
from rollout.verify import verify
from tests.support.jobs import (
    EXPECTED,
    JOB,
    LIVE,
    FakeEngine,
    config_of,
    keys,
    load_fake,
    read_records,
    refuse_to_load,
    without_attempt,
    write_part,
)


def test_job_writes_every_sample_once_in_order(uninterrupted: list[dict[str, Any]]) -> None:
    assert keys(uninterrupted) == EXPECTED


def test_complete_run_has_files_and_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_job(config_of(tmp_path, *JOB, "reward._target_=rollout.arithmetic.exact_match"), load_fake())
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["attempts", "metrics", "rows.arrow", "run.json", "shards"]
    assert len(list((out / "shards").iterdir())) == 10
    assert verify(out).complete
    lines = capsys.readouterr().out
    assert "prompts:     20, 60 samples (3 each)\n" in lines
    assert "live batch:  5 to 5 samples" in lines
    assert "mean reward: 0." in lines
    assert f"{out}/shards/*.parquet" in lines
    assert f"python -m rollout.verify {out}" in lines


def test_live_batch_does_not_drain_between_shards(tmp_path: Path) -> None:
    engine = FakeEngine()
    run_job(config_of(tmp_path, *JOB), load_fake(engine))
    assert engine.live_counts[: -LIVE + 1] == [LIVE] * (60 - LIVE + 1)


def test_requests_are_read_only_as_samples_are_admitted(tmp_path: Path) -> None:
    """A worker that stops must not sit on shards that it has not begun."""
    engine = FakeEngine(fail_after=1)
    with pytest.raises(RuntimeError, match="the engine fails here"):
        run_job(config_of(tmp_path, *JOB), load_fake(engine))
    assert len(engine.asked) == LIVE + 1
    assert len(list((tmp_path / "out" / "work" / "parts").iterdir())) == 1


@pytest.mark.parametrize("records", [0, 1, 11, 12, 13, 40, 59])
def test_failed_engine_loses_only_unfinished_samples(
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


def test_complete_run_is_not_changed(
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


@pytest.mark.parametrize("damage", ["removed", "flipped"])
def test_complete_run_gets_its_row_ids_back(tmp_path: Path, damage: str) -> None:
    config = config_of(tmp_path, *JOB)
    run_job(config, load_fake())
    path = tmp_path / "out" / "rows.arrow"
    before = path.read_bytes()
    path.unlink()
    if damage == "flipped":
        path.write_bytes(bytes([before[0] ^ 1]) + before[1:])
    with pytest.raises(InputError, match=r"rows\.arrow"):
        verify(tmp_path / "out")
    assert run_job(config, refuse_to_load) == Exit.COMPLETE
    assert path.read_bytes() == before
    assert verify(tmp_path / "out").complete


def test_foreign_files_among_the_shards_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(tmp_path, *JOB)
    run_job(config, load_fake())
    assert "not of this run" not in caplog.text
    for name in ("old\n.parquet", ".nfs0001"):
        (tmp_path / "out/shards" / name).touch()
    assert run_job(config, refuse_to_load) == Exit.COMPLETE
    assert r"remove 'old\n.parquet'." in caplog.text


def test_work_folder_left_by_a_kill_is_removed(tmp_path: Path) -> None:
    config = config_of(tmp_path, *JOB)
    run_job(config, load_fake())
    (tmp_path / "out" / "work").mkdir()
    (tmp_path / "out" / "work" / "00000.part.jsonl").write_text("{}")
    assert run_job(config, refuse_to_load) == Exit.COMPLETE
    assert not (tmp_path / "out" / "work").exists()


def test_shard_without_manifest_is_generated_again(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    config = config_of(tmp_path, *JOB)
    run_job(config, load_fake())
    paths = RunPaths(tmp_path / "out")
    paths.manifest(2).unlink()
    engine = FakeEngine()
    assert run_job(config, load_fake(engine)) == Exit.COMPLETE
    assert sorted(engine.asked) == EXPECTED[24:36]
    assert without_attempt(read_records(paths.root)) == without_attempt(uninterrupted)


def test_complete_part_file_is_committed_without_the_engine(tmp_path: Path) -> None:
    """Killed between the last record of a shard and its commit."""
    config = config_of(tmp_path, *JOB)
    run_job(config, load_fake())
    paths = RunPaths(tmp_path / "out")
    whole = read_records(paths.root)
    paths.manifest(1).unlink()
    write_part(read_run(paths), 1, map(_record, whole[12:24]))
    engine = FakeEngine()
    assert run_job(config, load_fake(engine)) == Exit.COMPLETE
    assert engine.asked == []
    assert read_records(paths.root) == whole


def _record(values: dict[str, Any]) -> Any:
    from rollout.records import RECORD_COLUMNS, Record

    return Record(**{name: values[name] for name in RECORD_COLUMNS})


def test_run_resumes_with_other_execution_settings(tmp_path: Path) -> None:
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


def test_model_that_fails_to_load_leaves_no_run(tmp_path: Path) -> None:
    """Another model may then be tried with the same output directory."""

    def fail(*arguments: object) -> Any:
        raise InputError("model.path is wrong.")

    with pytest.raises(InputError):
        run_job(config_of(tmp_path, *JOB), fail)
    assert run_job(config_of(tmp_path, *JOB, "seed=5"), load_fake()) == Exit.COMPLETE


def test_run_keeps_its_dtype(tmp_path: Path) -> None:
    seen = []

    def load(dtype: str, fail_after: int | None = None) -> Any:
        def loading(config: Any, prompts: Any, topology: Topology) -> Any:
            seen.append(config.model.dtype)
            return replace(load_fake(FakeEngine(fail_after=fail_after))(config, prompts, topology), dtype=dtype)

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


def test_bad_prompts_become_error_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert "4 prompts (bad_prompt 6, empty_prompt 2)" in capsys.readouterr().out
    assert run_job(config_of(tmp_path, data, "sampling.n=2"), refuse_to_load) == Exit.ERROR_ROWS


def test_shard_of_bad_prompts_is_committed(tmp_path: Path) -> None:
    data = write_rows(tmp_path, "fine", None, "", "fine too")
    config = config_of(tmp_path, data, "output.rows_per_shard=1")
    assert run_job(config, load_fake()) == Exit.ERROR_ROWS
    assert verify(tmp_path / "out").complete


def failing_reward(prompt_row: dict[str, Any], completion_text: str) -> float:
    if prompt_row["id"] == "arithmetic-00003":
        raise ZeroDivisionError("division by zero")
    return float(prompt_row["answer"])


def test_reward_that_raises_makes_an_error_record(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
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


def test_reward_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^reward\._target_=no\.such\.reward "):
        run_job(config_of(tmp_path, "reward._target_=no.such.reward"), refuse_to_load)
