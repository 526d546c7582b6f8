"""Verification of damaged runs: every change is noticed, told in sentences, and blamed on the file at fault."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.errors import Exit
from rollout.job.job import run_job
from rollout.run_dir import shard_batches
from rollout.run_dir.hashed_file import file_sha256
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.row_ids_file import read_row_ids
from rollout.run_dir.row_index import RowIndex
from rollout.run_dir.run import read_run
from rollout.run_dir.sealed_json import seal, unseal
from rollout.run_dir.shards import Manifest, count_table, read_manifest, read_shard
from rollout.verify import main, verify
from tests.support.jobs import config_of, load_fake

ROWS, SAMPLES, PER_SHARD = 11, 3, 4


@pytest.fixture(scope="module", params=["parquet", "jsonl"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of 11 prompts, three samples each, in three shards."""
    folder = tmp_path_factory.mktemp("run")
    sizes = (f"data.limit={ROWS}", f"sampling.n={SAMPLES}", f"output.rows_per_shard={PER_SHARD}")
    reward = "reward._target_=tests.job.test_rewards.length"
    assert run_job(config_of(folder, *sizes, reward, f"output.format={request.param}"), load_fake()) == Exit.COMPLETE
    return folder / "out"


@pytest.fixture
def paths(whole: Path, tmp_path: Path) -> RunPaths:
    shutil.copytree(whole, tmp_path / "out")
    return RunPaths(tmp_path / "out")


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print("seed", seed)
    return random.Random(seed)


def shard_path(paths: RunPaths, index: int) -> Path:
    return paths.shard(index, read_run(paths).format)


def status_of(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    status = main([str(paths.root)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def write_shard(paths: RunPaths, index: int, records: list[dict[str, Any]]) -> None:
    """Write a shard's records, with a manifest that agrees with them."""
    path = shard_path(paths, index)
    schema = pq.read_schema(path) if path.suffix == ".parquet" else None
    if schema is None:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pq.write_table(pa.Table.from_pylist(records, schema), path)
    describe(paths, index, asdict(count_table(read_shard(path))) if records else {})


def describe(paths: RunPaths, index: int, counts: dict[str, Any]) -> None:
    path = shard_path(paths, index)
    values = asdict(read_manifest(paths.manifest(index)))
    paths.manifest(index).write_bytes(
        seal(values | {"bytes": path.stat().st_size, "sha256": file_sha256(path)} | counts)
    )


def flips(content: bytes, rng: random.Random, count: int) -> Iterator[bytes]:
    for _ in range(count):
        flipped = bytearray(content)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        yield bytes(flipped)


@pytest.mark.parametrize("kind", ["run", "rows", "manifest", "shard"])
def test_every_flipped_bit_is_noticed(
    paths: RunPaths, rng: random.Random, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    shard = rng.randrange(3)
    path = {"run": paths.run, "rows": paths.rows, "manifest": paths.manifest(shard), "shard": shard_path(paths, shard)}
    content = path[kind].read_bytes()
    # Of a manifest and a shard, the others are tried in the other format.
    for flipped in flips(content, rng, 250 if kind in ("run", "rows") else 125):
        path[kind].write_bytes(flipped)
        status, text = status_of(paths, capsys)
        assert status == (2 if kind in ("run", "rows") else 1)
        if kind in ("run", "rows"):
            assert str(path[kind]) in text
            assert len(text.splitlines()) == 1
        else:
            assert f"shards torn: 1\n  {shard_path(paths, shard).name}: " in text
    path[kind].write_bytes(content)
    assert status_of(paths, capsys)[0] == 0


def test_manifest_with_a_field_too_many_is_refused(paths: RunPaths) -> None:
    values = asdict(read_manifest(paths.manifest(0)))
    paths.manifest(0).write_bytes(seal(values | {"other": 1}))
    assert len(verify(paths.root).torn) == 1


@pytest.mark.parametrize("name", [field.name for field in fields(Manifest)])
@pytest.mark.parametrize("value", [None, "x", [], float("nan"), 10**30, True, {"a": 1}])
def test_manifest_with_an_odd_value_is_refused(paths: RunPaths, name: str, value: Any) -> None:
    values = asdict(read_manifest(paths.manifest(1)))
    paths.manifest(1).write_bytes(seal(values | {name: value}))
    assert len(verify(paths.root).torn) == 1


@pytest.mark.parametrize("name", ["rows", "samples", "rows_per_shard"])
@pytest.mark.parametrize("value", [None, "x", 0, -1, 1.5, True, []])
def test_run_of_an_odd_size_is_refused(
    paths: RunPaths, capsys: pytest.CaptureFixture[str], name: str, value: Any
) -> None:
    paths.run.write_bytes(seal(unseal(paths.run.read_bytes()) | {name: value}))
    status, text = status_of(paths, capsys)
    assert (status, len(text.splitlines())) == (2, 1)
    assert name in text


DEEP = "[" * 100_000 + "]" * 100_000
ODD_LINES = [
    DEEP,
    "[]",
    "5",
    "null",
    "{}",
    "",
    "{",
    '{"row_id": "a"}',
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    "9" * 10_000,
]


@pytest.mark.parametrize("line", ODD_LINES, ids=range(len(ODD_LINES)))
@pytest.mark.parametrize("place", [0, 1])
def test_odd_line_is_told_in_a_sentence(
    paths: RunPaths, capsys: pytest.CaptureFixture[str], line: str, place: int
) -> None:
    path = shard_path(paths, 2)
    if path.suffix == ".parquet":
        path.write_text(line)
    else:
        lines = path.read_text().splitlines()
        lines[place] = line
        path.write_text("\n".join(lines) + "\n", encoding="latin-1")
    describe(paths, 2, {})
    status, text = status_of(paths, capsys)
    assert status == 1
    assert f"shards torn: 1\n  {path.name}: " in text
    assert len(text) < 2000


ODD_VALUES: list[dict[str, Any]] = [
    *({"row_id": value} for value in (None, 5, [], "")),
    *({"sample": value} for value in (None, 2**31, 10**30, -1, 1.5, "0", [], {})),
    *({"prompt_ids": value} for value in (None, [None], ["a"], [2**40], {}, [[1]])),
    *({"completion_ids": value} for value in (None, 7, "abc")),
    *({"finish_reason": value} for value in (None, 1, [])),
    *({"error_class": value} for value in (None, 0, {})),
    *({"reward": value} for value in ("1", [], 10**400)),
]


@pytest.mark.parametrize("whole", ["jsonl"], indirect=True)
@pytest.mark.parametrize("change", ODD_VALUES, ids=str)
def test_odd_value_is_told_in_a_sentence(
    paths: RunPaths, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    path = shard_path(paths, 0)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[1] |= change
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    describe(paths, 0, {})
    status, text = status_of(paths, capsys)
    assert status == 1
    assert "INCOMPLETE" in text


def test_rewards_that_are_no_numbers_are_compared(paths: RunPaths) -> None:
    records = read_shard(shard_path(paths, 0)).to_pylist()
    records[0]["reward"] = float("nan")
    write_shard(paths, 0, records)
    assert verify(paths.root).complete
    describe(paths, 0, {"reward_sum": 1.0})
    assert len(verify(paths.root).torn) == 1


def test_file_that_nfs_keeps_for_a_process_is_no_foreign_file(paths: RunPaths) -> None:
    (paths.shards / ".nfs000000000001").touch()
    assert verify(paths.root).complete


def test_names_and_ids_do_not_steer_the_terminal(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    (paths.shards / "\x1b[31mred\udc80").touch()
    records = read_shard(shard_path(paths, 0)).to_pylist()
    records[0]["row_id"] = "a\nb\x1b[2J"
    write_shard(paths, 0, records)
    status, text = status_of(paths, capsys)
    assert status == 1
    assert "\x1b" not in text
    assert "a\\nb\\x1b[2J sample 0" in text


def test_findings_are_those_of_a_simple_count(
    paths: RunPaths, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shuffle records within and among shards, take some away, double some, and add strangers."""
    monkeypatch.setattr(shard_batches, "_BATCH_RECORDS", 5)
    ids = read_row_ids(paths.rows).to_pylist()
    backup = paths.root.with_name("backup")
    shutil.copytree(paths.root, backup)
    for _ in range(12):
        shutil.rmtree(paths.root)
        shutil.copytree(backup, paths.root)
        shards = [read_shard(shard_path(paths, index)).to_pylist() for index in range(3)]
        gone = rng.randrange(6)
        for _ in range(rng.randrange(6)):
            source, target = rng.choice(shards), rng.choice(shards)
            record = dict(rng.choice(source))
            action = rng.choice(["drop", "double", "move", "rename", "renumber", "swap"])
            if action in ("drop", "move") and len(source) > 1:
                source.remove(record)
            if action in ("double", "move"):
                target.insert(rng.randrange(len(target) + 1), record)
            if action == "rename":
                target[rng.randrange(len(target))] |= {"row_id": rng.choice(["stranger", *ids])}
            if action == "renumber":
                target[rng.randrange(len(target))] |= {"sample": rng.choice([-1, 0, 2, 3])}
            if action == "swap":
                rng.shuffle(target)
        for index, records in enumerate(shards):
            write_shard(paths, index, records)
        if gone < 3:
            paths.manifest(gone).unlink()
            shards[gone] = []
        found = Counter((record["row_id"], record["sample"]) for records in shards for record in records)
        wanted = [(row_id, sample) for row_id in ids for sample in range(SAMPLES)]
        findings = verify(paths.root)
        assert not findings.torn
        missing = [key for key in wanted if not found[key]]
        assert (findings.missing.first, len(findings.missing)) == (missing[:20], len(missing))
        assert findings.duplicated.first == [key for key in wanted if found[key] > 1]
        strangers = [key for records in shards for record in records if (key := _key(record)) not in set(wanted)]
        assert findings.foreign.first == [f"{row_id} sample {sample}" for row_id, sample in strangers][:20]
        assert findings.found == len(wanted) - len(missing)


def _key(record: dict[str, Any]) -> tuple[str, int]:
    return record["row_id"], record["sample"]


def test_rows_are_found_by_id_though_hashes_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"{number:03}" for number in range(300)]
    chunked = pa.chunked_array([ids[:100], ids[100:]])
    for collide in (False, True):
        if collide:
            lengths = lambda names: np.array([int(name) % 7 for name in names], np.int64)  # noqa: E731
            monkeypatch.setattr("rollout.run_dir.row_index._hashes", lengths)
        wanted = ["299", "007", "555", "000"]
        assert RowIndex(chunked).rows(wanted).tolist() == [299, 7, -1, 0]


def test_folder_of_shards_that_cannot_be_listed_is_told_in_a_sentence(
    paths: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    paths.shards.rename(paths.root / "elsewhere")
    paths.shards.touch()
    status, text = status_of(paths, capsys)
    assert (status, len(text.splitlines())) == (2, 1)
