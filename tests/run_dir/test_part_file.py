"""Part files: appended records are read again, whatever was torn, damaged, or is of another run."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from rollout.records import Record
from rollout.requests import Request
from rollout.run_dir.file_system import LOCAL
from rollout.run_dir.part_file import PartFile, ShardKey, part_paths, read_part, read_parts
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.record_lines import SampleKey, decode_record
from rollout.sampling_params import SamplingParams
from tests.support.jobs import record_of

KEY = ShardKey("digest", 7)


def records(count: int) -> list[Record]:
    return [record_of(Request(f"row {i // 2}", [1, 2, i], SamplingParams(n=2)), i % 2) for i in range(count)]


def begun(folder: Path) -> RunPaths:
    """Let a folder hold a run."""
    folder.mkdir(exist_ok=True)
    paths = RunPaths(folder)
    paths.run.touch()
    return paths


def written(folder: Path, made: list[Record], writer: str = "w", key: ShardKey = KEY) -> Path:
    part = PartFile(LOCAL, begun(folder), key, writer)
    for record in made:
        part.append(record)
    part.close()
    return part.path


def found(path: Path) -> list[Record]:
    return [line.record for line in read_part(LOCAL, path, KEY)]


def test_appended_records_are_read_again(tmp_path: Path) -> None:
    made = records(6)
    path = written(tmp_path, made)
    assert found(path) == made
    assert [decode_record(line.location.read(LOCAL)) for line in read_part(LOCAL, path, KEY)] == made
    later = next(line.location.offset for line in read_part(LOCAL, path, KEY) if line.record == made[4])
    assert [line.record for line in read_part(LOCAL, path, KEY, start=later)] == made[4:]


def test_kill_loses_no_appended_record(tmp_path: Path) -> None:
    part = PartFile(LOCAL, begun(tmp_path), KEY, "w")
    part.append(records(1)[0])
    # Neither closed nor synced: what another process sees is what a kill leaves.
    assert found(part.path) == records(1)
    part.close()


def test_tail_torn_at_any_byte_costs_its_record_alone(tmp_path: Path) -> None:
    made = records(3)
    path = written(tmp_path, made)
    whole = path.read_bytes()
    ends = [line.location.offset + line.location.length for line in read_part(LOCAL, path, KEY)]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        assert found(path) == made[: sum(end <= size for end in ends)], size


def test_any_flipped_bit_costs_at_most_its_record(tmp_path: Path) -> None:
    rng = random.Random(3)
    made = records(3)
    path = written(tmp_path, made)
    whole = path.read_bytes()
    for position in rng.sample(range(8 * len(whole)), 1500):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(bytes(damaged))
        left = found(path)
        assert all(record in made for record in left), position
        # A damaged line break costs the lines on both its sides, and a damaged header all lines.
        header = position // 8 < whole.index(b"\n") + 1
        assert len(left) == 0 if header else len(left) in (1, 2), position


@pytest.mark.parametrize("junk", [b"\0" * 100 + b"\n", b"{}\n", b"[1]\n", b'{"row_id": "x"}\n', b"\xff\xfe\n", b"\n"])
def test_junk_between_lines_is_left_out_and_said(tmp_path: Path, junk: bytes, caplog: pytest.LogCaptureFixture) -> None:
    made = records(3)
    path = written(tmp_path, made)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], junk, *lines[2:]]))
    assert found(path) == made
    assert caplog.text.count("is damaged") == 1


@pytest.mark.parametrize("other", [ShardKey("another run", 7), ShardKey("digest", 8)])
def test_file_of_another_run_or_shard_is_left_alone(
    tmp_path: Path, other: ShardKey, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, records(2), key=other)
    assert found(path) == []
    assert "is not of shard 7 of this run" in caplog.text
    # Not even its lines under a right header are taken.
    right = written(tmp_path / "right", records(1))
    header = right.read_bytes().splitlines(keepends=True)[0]
    foreign = path.read_bytes().splitlines(keepends=True)[1:]
    right.write_bytes(header + b"".join(foreign))
    assert found(right) == []


def test_writers_of_one_shard_have_files_of_their_own(tmp_path: Path) -> None:
    made = records(6)
    paths = [
        written(tmp_path, made[:3], "a"),
        written(tmp_path, made[2:5], "b"),
        written(tmp_path, made[5:], "a"),
    ]
    assert len(set(paths)) == 3
    assert part_paths(LOCAL, RunPaths(tmp_path), 7) == sorted(paths)
    parts = read_parts(LOCAL, RunPaths(tmp_path), KEY)
    assert [decode_record(location.read(LOCAL)) for location in parts.finished.values()] != []
    assert parts.finished.keys() == {SampleKey(record.row_id, record.sample) for record in made}
    assert parts.finished[SampleKey("row 1", 0)].path == paths[0]  # of equal records, the first counts


def test_stopped_samples_go_on_from_the_longest_record(tmp_path: Path) -> None:
    made = [replace(record, finish_reason="abort") for record in records(3)]
    short = replace(made[0], completion_ids=[1], logprobs=[-1.0], sampler_logprobs=[-1.0], weight_versions=[0])
    long = replace(
        made[0],
        completion_ids=[1, 2],
        logprobs=[-1.0, -2.0],
        sampler_logprobs=[-1.0, -2.0],
        weight_versions=[0, 0],
        end_ids=[5],
    )
    written(tmp_path, [long, made[1]], "a")
    written(tmp_path, [short, replace(made[1], finish_reason="stop"), made[2]], "b")
    parts = read_parts(LOCAL, RunPaths(tmp_path), KEY)
    assert parts.under_way == {SampleKey("row 0", 0): long, SampleKey("row 1", 0): made[2]}
    assert list(parts.finished) == [SampleKey("row 0", 1)]


def test_part_file_is_synced_every_second_and_when_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    synced: list[float] = []
    part = PartFile(LOCAL, begun(tmp_path), KEY, "w", clock=lambda: now)
    monkeypatch.setattr(LOCAL, "sync", lambda file: synced.append(now), raising=False)
    for step, record in enumerate(records(30)):
        now = step * 0.1
        part.append(record)
    assert len(synced) == 2
    part.close()
    assert len(synced) == 3
