"""Verification of a run from its directory: complete runs pass, every other finding is listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.errors import Exit
from rollout.job.job import run_job
from rollout.record_columns import SCHEMA
from rollout.records import RECORD_COLUMNS, Record
from rollout.run_dir.file_system import LOCAL
from rollout.run_dir.hashed_file import file_sha256
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.row_ids_file import write_row_ids
from rollout.run_dir.run import read_run
from rollout.run_dir.sealed_json import seal, unseal
from rollout.run_dir.shards import Manifest, count_table, read_manifest, read_shard
from rollout.verify import main, verify
from tests.support.jobs import config_of, load_fake, write_part


@pytest.fixture(params=["parquet", "jsonl"])
def paths(request: pytest.FixtureRequest, tmp_path: Path) -> RunPaths:
    """A complete run of ten prompts, two samples each, in four shards."""
    form = f"output.format={request.param}"
    config = config_of(tmp_path, "data.limit=10", "sampling.n=2", "output.rows_per_shard=3", form)
    assert run_job(config, load_fake()) == Exit.COMPLETE
    return RunPaths(tmp_path / "out")


def shard_path(paths: RunPaths, index: int) -> Path:
    return next(path for path in paths.shards.glob(f"{index:05d}.*") if path.suffix != ".json")


def rewrite(paths: RunPaths, index: int, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change a shard and make its manifest agree with it, as a faulty writer would."""
    path = shard_path(paths, index)
    table = change(read_shard(path))
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    values = asdict(read_manifest(paths.manifest(index)))
    values |= {"bytes": path.stat().st_size, "sha256": file_sha256(path), **asdict(count_table(table))}
    paths.manifest(index).write_bytes(seal(values))


def run_verify(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main([str(paths.root)])
    return status, capsys.readouterr().out


def test_complete_run_passes(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run_verify(paths, capsys) == (0, "complete: 20 of 20 samples\n")


def test_missing_sample_is_listed(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    gone = read_shard(shard_path(paths, 1)).column("row_id")[2].as_py()
    rewrite(paths, 1, lambda table: pa.concat_tables([table.slice(0, 2), table.slice(3)]))
    status, out = run_verify(paths, capsys)
    assert status == 1
    assert verify(paths.root).missing.first == [(gone, 0)]
    assert f"samples missing: 1\n  {gone} sample 0\n" in out
    assert "INCOMPLETE: 19 of 20 samples" in out


def test_duplicated_sample_is_listed(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    table = read_shard(shard_path(paths, 0))
    twice = (table.column("row_id")[3].as_py(), table.column("sample")[3].as_py())
    rewrite(paths, 2, lambda other: pa.concat_tables([other, table.slice(3, 1)]))
    status, out = run_verify(paths, capsys)
    assert status == 1
    assert verify(paths.root).duplicated.first == [twice]
    assert f"samples duplicated: 1\n  {twice[0]} sample {twice[1]}\n" in out


def test_sample_of_an_unknown_prompt_is_listed(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    def other_row(table: pa.Table) -> pa.Table:
        ids = ["stranger", *table.column("row_id").to_pylist()[1:]]
        return table.set_column(0, SCHEMA.field("row_id"), pa.array(ids))

    rewrite(paths, 3, other_row)
    status, out = run_verify(paths, capsys)
    assert status == 1
    assert verify(paths.root).foreign.first == ["stranger sample 0"]
    assert len(verify(paths.root).missing) == 1
    assert "files and samples of no prompt of this run: 1\n  stranger sample 0\n" in out


@pytest.mark.parametrize("sample", [2, -1])
def test_sample_with_an_invalid_number_is_listed(paths: RunPaths, sample: int) -> None:
    def other_sample(table: pa.Table) -> pa.Table:
        samples = [sample, *table.column("sample").to_pylist()[1:]]
        return table.set_column(1, SCHEMA.field("sample"), pa.array(samples, pa.int32()))

    rewrite(paths, 0, other_sample)
    assert len(verify(paths.root).foreign) == 1
    assert len(verify(paths.root).missing) == 1


@pytest.mark.parametrize("size", [0, 10, -1])
def test_torn_shard_is_listed(paths: RunPaths, capsys: pytest.CaptureFixture[str], size: int) -> None:
    path = shard_path(paths, 2)
    path.write_bytes(path.read_bytes()[:size])
    status, out = run_verify(paths, capsys)
    assert status == 1
    assert f"shards torn: 1\n  {path.name}: it has" in out
    assert "samples missing: 6" in out
    assert "remove its manifest" in out


def test_flipped_bit_is_found(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    path = shard_path(paths, 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert run_verify(paths, capsys)[0] == 1
    assert verify(paths.root).torn == [f"{path.name}: its sha256 differs from its manifest's"]


def test_removed_shard_is_listed(paths: RunPaths) -> None:
    path = shard_path(paths, 0)
    path.unlink()
    assert verify(paths.root).torn == [f"{path.name}: the file is missing"]


def test_shard_with_another_fingerprint_is_listed(paths: RunPaths) -> None:
    values = asdict(read_manifest(paths.manifest(0))) | {"fingerprint": "other"}
    paths.manifest(0).write_bytes(seal(values))
    assert verify(paths.root).torn == [f"{shard_path(paths, 0).name}: its manifest has another fingerprint"]


def test_shard_with_another_schema_is_listed(tmp_path: Path) -> None:
    config = config_of(tmp_path, "data.limit=4")
    run_job(config, load_fake())
    paths = RunPaths(tmp_path / "out")
    path = shard_path(paths, 0)
    pq.write_table(pq.read_table(path).drop_columns(["reward"]), path)
    values = asdict(read_manifest(paths.manifest(0)))
    values |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    paths.manifest(0).write_bytes(seal(values))
    assert "reward is absent" in verify(paths.root).torn[0]


@pytest.mark.parametrize("name", [field.name for field in fields(Manifest)])
def test_manifest_that_differs_from_its_shard_in_any_field_is_listed(paths: RunPaths, name: str) -> None:
    values = asdict(read_manifest(paths.manifest(0)))
    changed = (
        {**values[name], "other": 1} if isinstance(values[name], dict) else values[name] * 2 + type(values[name])(7)
    )
    paths.manifest(0).write_bytes(seal(values | {name: changed}))
    assert len(verify(paths.root).torn) == 1


def test_manifest_is_compared_with_every_kind_of_record(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "answer": "3"} for prompt in ["a", "", "b", "c", None]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = "reward._target_=tests.job.test_rewards.length"
    config = config_of(tmp_path, f"data.path={tmp_path}/rows.jsonl", reward, "sampling.n=3", "output.rows_per_shard=2")
    assert run_job(config, load_fake()) == Exit.ERROR_ROWS
    assert verify(tmp_path / "out").complete


def test_uncommitted_shard_is_listed(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    paths.manifest(3).unlink()
    status, out = run_verify(paths, capsys)
    assert status == 1
    assert f"shards not committed: 1\n  {shard_path(paths, 3).name}\n" in out
    assert "run the same command again" in out


def test_samples_in_part_files_are_said_to_be_kept(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    paths.manifest(1).unlink()
    records = [Record(**record) for record in read_shard(shard_path(paths, 0)).select(RECORD_COLUMNS).to_pylist()[:3]]
    part = write_part(read_run(paths), 1, records)
    part.write_bytes(part.read_bytes()[:-5])  # the last one was not written to its end
    assert "run the same command again; the 2 samples finished in part files are kept." in run_verify(paths, capsys)[1]


def test_foreign_files_among_the_shards_are_listed(paths: RunPaths) -> None:
    (paths.shards / "00099.parquet").write_bytes(b"x")
    assert verify(paths.root).foreign.first == ["00099.parquet"]
    assert not verify(paths.root).complete


def test_error_records_are_reported_in_a_complete_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ["a", "", None, "b", ""]))
    assert run_job(config_of(tmp_path, f"data.path={tmp_path}/rows.jsonl"), load_fake()) == Exit.ERROR_ROWS
    capsys.readouterr()
    status, out = run_verify(RunPaths(tmp_path / "out"), capsys)
    assert status == 0
    assert "samples in error: 3\n" in out
    assert "errors by class: empty_prompt 2, bad_prompt 1\ncomplete: 5 of 5 samples\n" in out


def test_at_most_twenty_items_of_a_kind_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_job(config_of(tmp_path, "data.limit=30"), load_fake())
    paths = RunPaths(tmp_path / "out")
    paths.manifest(0).unlink()
    capsys.readouterr()
    out = run_verify(paths, capsys)[1]
    assert "samples missing: 30\n" in out
    assert out.count(" sample 0\n") == 20
    assert "  and 10 more\n" in out


@pytest.mark.parametrize("broken", ["nothing", "run", "rows", "fewer rows"])
def test_folder_without_a_readable_run_is_refused(
    paths: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    if broken == "nothing":
        paths = RunPaths(tmp_path / "elsewhere")
    elif broken == "run":
        paths.run.write_text("{")
    elif broken == "rows":
        paths.rows.write_bytes(b"x")
    else:
        sha256 = write_row_ids(LOCAL, paths.rows, paths.root / "temporary", ["one"])
        stored = unseal(paths.run.read_bytes())
        paths.run.write_bytes(seal(stored | {"rows_sha256": sha256}))
    assert main([str(paths.root)]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert str(paths.root) in captured.err
