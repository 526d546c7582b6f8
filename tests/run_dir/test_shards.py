"""Committed shards: schema, manifest, and the order in which they appear."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rollout.run_dir.atomic_write
from rollout.errors import InputError
from rollout.record_columns import SCHEMA
from rollout.records import RECORD_COLUMNS, Record
from rollout.requests import Request
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.record_table import table_of
from rollout.run_dir.shards import commit, file_sha256, read_manifest, read_shard
from rollout.sampling_params import SamplingParams
from tests.support.jobs import record_of


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run")
    paths.shards.mkdir(parents=True)
    paths.work.mkdir()
    return paths


def records() -> list[Record]:
    made = [record_of(Request(f"row {i // 2}", [1, i], SamplingParams(n=2), seed=3), i % 2) for i in range(6)]
    made[1] = replace(made[1], reward=0.1)
    made[2] = replace(made[2], reward=1.0, error_class="reward_failed", error="ü")
    empty: list[int] = []
    made[5] = Record("row 2", 1, empty, empty, "", [], [], "error", "empty_prompt", "Empty.")
    return made


def test_schema_matches_the_contract() -> None:
    floats, ints = pa.list_(pa.float32()), pa.list_(pa.int32())
    assert {field.name: field.type for field in SCHEMA} == {
        "row_id": pa.string(),
        "sample": pa.int32(),
        "prompt_ids": ints,
        "completion_ids": ints,
        "text": pa.string(),
        "logprobs": floats,
        "sampler_logprobs": floats,
        "finish_reason": pa.string(),
        "error_class": pa.string(),
        "error": pa.string(),
        "reward": pa.float32(),
        "seed": pa.int64(),
        "weight_version": pa.int32(),
        "attempt": pa.int32(),
    }
    assert SCHEMA.names == list(RECORD_COLUMNS)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_committed_shard_is_read_again(paths: RunPaths, form: str) -> None:
    made = records()
    manifest = commit(paths, 3, form, made, "fingerprint")
    path = paths.shard(3, form)
    assert read_shard(path).equals(table_of(made))
    assert read_shard(path).column("logprobs").to_pylist() == [record.logprobs for record in made]
    assert manifest == read_manifest(paths.manifest(3))
    assert (manifest.shard, manifest.file, manifest.fingerprint) == (3, f"00003.{form}", "fingerprint")
    assert (manifest.rows, manifest.samples, manifest.error_rows) == (3, 6, 2)
    assert manifest.errors == {"reward_failed": 1, "empty_prompt": 1}
    assert sum(manifest.finish_reasons.values()) == 6
    assert manifest.completion_tokens == sum(len(record.completion_ids) for record in made)
    assert (manifest.rewards, manifest.reward_sum) == (2, 1.1)
    assert (manifest.bytes, manifest.sha256) == (path.stat().st_size, file_sha256(path))
    assert sorted(file.name for file in paths.shards.iterdir()) == ["00003.json", f"00003.{form}"]
    assert list(paths.work.iterdir()) == []


def test_shards_load_with_datasets(paths: RunPaths, tmp_path: Path) -> None:
    made = records()
    commit(paths, 0, "parquet", made[:4], "f")
    commit(paths, 1, "parquet", made[4:], "f")
    files = str(paths.shards / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["row_id"][:] == [record.row_id for record in made]
    assert loaded["logprobs"][:] == [record.logprobs for record in made]
    assert loaded["reward"][0] is None
    assert loaded.features["reward"].dtype == "float32"
    assert loaded.features["logprobs"].feature.dtype == "float32"


def test_shard_of_errors_has_the_schema(paths: RunPaths) -> None:
    commit(paths, 0, "parquet", [records()[5]], "f")
    assert pq.read_schema(paths.shard(0, "parquet")).equals(SCHEMA)


@pytest.mark.parametrize("crash_at", [1, 2])
def test_crash_before_the_manifest_commits_nothing(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    replaced = 0
    real = rollout.run_dir.atomic_write.os.replace

    def crashing(source: Path, target: Path) -> None:
        nonlocal replaced
        replaced += 1
        if replaced == crash_at:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(rollout.run_dir.atomic_write.os, "replace", crashing)
    with pytest.raises(KeyboardInterrupt):
        commit(paths, 0, "parquet", records(), "f")
    assert not paths.manifest(0).exists()
    assert paths.shard(0, "parquet").exists() == (crash_at == 2)
    replaced = 10
    commit(paths, 0, "parquet", records(), "f")
    assert read_shard(paths.shard(0, "parquet")).num_rows == 6


def test_shard_is_on_disk_before_its_manifest(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what a power cut may interrupt: data, its name, the manifest's data, its name."""
    events: list[str] = []
    replace_file, sync_file, sync_folder = (
        rollout.run_dir.atomic_write.os.replace,
        rollout.run_dir.atomic_write.os.fsync,
        rollout.run_dir.atomic_write.sync_folder,
    )

    def traced_sync(descriptor: int) -> None:
        events.append("sync")
        sync_file(descriptor)

    def traced_replace(source: Path, target: Path) -> None:
        events.append(Path(target).suffix)
        replace_file(source, target)

    def traced_folder(folder: Path) -> None:
        sync_folder(folder)
        events.append("folder")

    monkeypatch.setattr(rollout.run_dir.atomic_write.os, "fsync", traced_sync)
    monkeypatch.setattr(rollout.run_dir.atomic_write.os, "replace", traced_replace)
    monkeypatch.setattr(rollout.run_dir.atomic_write, "sync_folder", traced_folder)
    commit(paths, 0, "parquet", records(), "f")
    assert events == ["sync", ".parquet", "sync", "folder", "sync", ".json", "sync", "folder"]


def test_other_schemas_are_refused(tmp_path: Path) -> None:
    table = table_of(records())
    pq.write_table(table.drop_columns(["reward"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="reward is absent"):
        read_shard(tmp_path / "a.parquet")
    at = SCHEMA.get_field_index("seed")
    pq.write_table(table.set_column(at, "seed", table.column("seed").cast(pa.int32())), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="seed is int32"):
        read_shard(tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text(json.dumps({"row_id": "a"}) + "\n")
    with pytest.raises(ValueError, match="line 1 does not have the declared columns"):
        read_shard(tmp_path / "c.jsonl")


def test_bad_manifests_are_refused(tmp_path: Path) -> None:
    for content in ("", "[]", "{}", '{"shard": 1}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(InputError, match="cannot be read as a manifest"):
            read_manifest(tmp_path / "a.json")


def test_jsonl_holds_float32_exactly(paths: RunPaths) -> None:
    made = records()
    commit(paths, 0, "jsonl", made, "f")
    rows = [json.loads(line) for line in paths.shard(0, "jsonl").read_text().splitlines()]
    assert [row["logprobs"] for row in rows] == [record.logprobs for record in made]
    assert not any(math.isnan(value) for row in rows for value in row["logprobs"])
