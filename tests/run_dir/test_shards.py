"""Committed shards: schema, manifest, and the order in which they appear."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.errors import InputError
from rollout.record_columns import SCHEMA
from rollout.records import RECORD_COLUMNS, Record
from rollout.requests import Request
from rollout.run_dir import commit as commit_module
from rollout.run_dir.commit import DamagedPart, ShardContent
from rollout.run_dir.file_system import LOCAL
from rollout.run_dir.fingerprint import Fingerprint
from rollout.run_dir.hashed_file import file_sha256
from rollout.run_dir.part_file import PartFile, ShardKey
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.record_lines import SampleKey
from rollout.run_dir.record_table import table_of
from rollout.run_dir.run import RunDir
from rollout.run_dir.sealed_json import seal
from rollout.run_dir.shards import Manifest, read_manifest, read_shard
from rollout.sampling_params import SamplingParams
from tests.support.jobs import record_of

FINGERPRINT = Fingerprint({"seed": 3})


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    paths.run.touch()
    return paths


def run_of(paths: RunPaths, form: str) -> RunDir:
    return RunDir(
        paths,
        FINGERPRINT,
        rows=3,
        rows_sha256="",
        samples=2,
        rows_per_shard=3,
        format=form,
        columns={},
        dtype="float32",
    )


def commit(paths: RunPaths, shard: int, form: str, made: list[Record]) -> Manifest:
    """Commit records as a worker does."""
    run = run_of(paths, form)
    part = PartFile(LOCAL, paths, ShardKey(FINGERPRINT.digest, shard), "w")
    locations = {SampleKey(record.row_id, record.sample): part.append(record) for record in made}
    part.close()
    return commit_module.commit(run, ShardContent(shard, list(locations), locations), SCHEMA, "w")


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
    manifest = commit(paths, 3, form, made)
    path = paths.shard(3, form)
    assert read_shard(path).equals(table_of(made))
    assert read_shard(path).column("logprobs").to_pylist() == [record.logprobs for record in made]
    assert manifest == read_manifest(paths.manifest(3))
    assert (manifest.shard, manifest.file, manifest.fingerprint) == (3, f"00003.{form}", FINGERPRINT.digest)
    assert (manifest.rows, manifest.samples, manifest.error_rows) == (3, 6, 2)
    assert manifest.errors == {"reward_failed": 1, "empty_prompt": 1}
    assert sum(manifest.finish_reasons.values()) == 6
    assert manifest.completion_tokens == sum(len(record.completion_ids) for record in made)
    assert (manifest.rewards, manifest.reward_sum) == (2, 1 + float(np.float32(0.1)))
    assert (manifest.bytes, manifest.sha256) == (path.stat().st_size, file_sha256(path))
    assert sorted(file.name for file in paths.shards.iterdir()) == ["00003.json", f"00003.{form}"]
    assert list((paths.work / "tmp").iterdir()) == []


def test_shards_load_with_datasets(paths: RunPaths, tmp_path: Path) -> None:
    made = records()
    commit(paths, 0, "parquet", made[:4])
    commit(paths, 1, "parquet", made[4:])
    files = str(paths.shards / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["row_id"][:] == [record.row_id for record in made]
    assert loaded["logprobs"][:] == [record.logprobs for record in made]
    assert loaded["reward"][0] is None
    assert loaded.features["reward"].dtype == "float32"
    assert loaded.features["logprobs"].feature.dtype == "float32"


def test_shard_of_errors_has_the_schema(paths: RunPaths) -> None:
    commit(paths, 0, "parquet", [records()[5]])
    assert pq.read_schema(paths.shard(0, "parquet")).equals(SCHEMA)


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
    commit(paths, 0, "jsonl", made)
    rows = [json.loads(line) for line in paths.shard(0, "jsonl").read_text().splitlines()]
    assert [row["logprobs"] for row in rows] == [record.logprobs for record in made]
    assert not any(math.isnan(value) for row in rows for value in row["logprobs"])


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_first_file_in_place_stays_and_the_manifest_describes_it(paths: RunPaths, form: str) -> None:
    made = records()
    first = commit(paths, 0, form, made)
    before = paths.shard(0, form).read_bytes()
    later = [replace(record, attempt=5) for record in made]
    assert commit(paths, 0, form, later) == first
    paths.manifest(0).unlink()  # the first worker was killed before it wrote one
    assert commit(paths, 0, form, later) == first
    assert paths.shard(0, form).read_bytes() == before


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("found", ["torn", "other tokens", "other samples"])
def test_file_in_place_that_is_not_the_shard_is_set_aside(paths: RunPaths, form: str, found: str) -> None:
    made = records()
    commit(paths, 0, form, made)
    expected = paths.shard(0, form).read_bytes()
    paths.manifest(0).unlink()
    if found == "torn":
        paths.shard(0, form).write_bytes(expected[:100])
    else:
        paths.shard(0, form).unlink()
        changed = [made[0], replace(made[1], completion_ids=[4], logprobs=[0.0], sampler_logprobs=[0.0]), *made[2:]]
        commit(paths, 0, form, changed if found == "other tokens" else made[:5])
        paths.manifest(0).unlink()
    manifest = commit(paths, 0, form, made)
    assert paths.shard(0, form).read_bytes() == expected
    assert manifest.sha256 == file_sha256(paths.shard(0, form))
    assert len(list(paths.damaged.iterdir())) == 1


def test_record_that_cannot_be_read_back_is_not_committed(paths: RunPaths) -> None:
    run = run_of(paths, "parquet")
    part = PartFile(LOCAL, paths, ShardKey(FINGERPRINT.digest, 0), "w")
    locations = {SampleKey(record.row_id, record.sample): part.append(record) for record in records()}
    part.close()
    content = bytearray(part.path.read_bytes())
    damaged = list(locations)[2]
    content[locations[damaged].offset + 40] ^= 1
    part.path.write_bytes(bytes(content))
    with pytest.raises(DamagedPart) as raised:
        commit_module.commit(run, ShardContent(0, list(locations), locations), SCHEMA, "w")
    assert list(raised.value.keys) == [damaged]
    assert list(paths.shards.iterdir()) == []


def test_any_change_of_a_manifest_is_noticed(paths: RunPaths) -> None:
    commit(paths, 0, "parquet", records())
    whole = paths.manifest(0).read_bytes()
    for position in random.Random(5).sample(range(8 * len(whole)), 500):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        paths.manifest(0).write_bytes(bytes(damaged))
        with pytest.raises(InputError, match="cannot be read as a manifest"):
            read_manifest(paths.manifest(0))
    paths.manifest(0).write_bytes(seal({"shard": 0}))
    with pytest.raises(InputError, match="cannot be read as a manifest"):
        read_manifest(paths.manifest(0))
