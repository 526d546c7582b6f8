"""Part files: appended records are read again, whatever a kill tore off."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rollout.records import Record
from rollout.requests import Request
from rollout.run_dir.part_file import PartFile, decode_record, encode_record
from rollout.sampling_params import SamplingParams
from tests.support.jobs import record_of


def records(count: int) -> list[Record]:
    return [record_of(Request(f"row {i // 2}", [1, 2, i], SamplingParams(n=2)), i % 2) for i in range(count)]


def test_record_survives_encoding_exactly() -> None:
    rng = np.random.default_rng(7)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    values = bits[np.isfinite(bits)].tolist()
    record = Record(
        row_id='ü\n"\\',
        sample=3,
        prompt_ids=[0, 2**31 - 1],
        completion_ids=[5],
        text="two\nlines \U0001f600 \x00 \u2028",
        logprobs=values,
        sampler_logprobs=[-0.0, float(np.float32(-1e-45))],
        finish_reason="stop",
        error_class="reward_failed",
        error="why",
        reward=0.1,
        seed=-(2**63),
        weight_version=4,
        attempt=2,
    )
    again = decode_record(encode_record(record))
    assert again == record
    assert math.copysign(1, again.sampler_logprobs[0]) == -1
    assert encode_record(record).count(b"\n") == 1


def test_line_of_a_fixed_record_never_changes() -> None:
    record = Record(
        row_id="a",
        sample=1,
        prompt_ids=[1, 2],
        completion_ids=[3],
        text="é",
        logprobs=[-0.5],
        sampler_logprobs=[-0.25],
        finish_reason="stop",
        seed=7,
    )
    assert encode_record(record) == (
        b'{"row_id":"a","sample":1,"prompt_ids":"AQAAAAIAAAA=","completion_ids":"AwAAAA==","text":"\\u00e9",'
        b'"logprobs":"AAAAvw==","sampler_logprobs":"AACAvg==","finish_reason":"stop","error_class":"","error":"",'
        b'"reward":null,"seed":7,"weight_version":0,"attempt":0,"reasoning":""}\n'
    )


def test_appended_records_are_read_again(tmp_path: Path) -> None:
    made = records(6)
    part = PartFile(tmp_path / "a")
    for record in made[:4]:
        part.append(record)
    part.close()
    part = PartFile(tmp_path / "a")
    assert part.done == {(record.row_id, record.sample) for record in made[:4]}
    for record in made[4:]:
        part.append(record)
    assert list(part.records()) == made
    part.close()


def test_kill_loses_no_appended_record(tmp_path: Path) -> None:
    part = PartFile(tmp_path / "a")
    part.append(records(1)[0])
    # Neither closed nor synced: what another process sees is what a kill leaves.
    assert len(PartFile(tmp_path / "a").done) == 1


def test_tail_torn_at_any_byte_is_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.run_dir.part_file.os.fsync", lambda descriptor: None)
    made = records(3)
    lines = [encode_record(record) for record in made]
    whole = b"".join(lines)
    ends = [0, len(lines[0]), len(lines[0] + lines[1]), len(whole)]
    path = tmp_path / "a"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        part = PartFile(path)
        kept = sum(end <= size for end in ends) - 1
        assert list(part.records()) == made[:kept], size
        assert path.stat().st_size == ends[kept]
        for record in made[kept:]:
            part.append(record)
        part.close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("junk", [b"\0" * 100, b"{}\n", b"[1]\n", b'{"row_id": "x"}\n', b"\xff\xfe\n", b"\n"])
def test_junk_is_truncated_with_all_that_follows(tmp_path: Path, junk: bytes) -> None:
    made = records(3)
    path = tmp_path / "a"
    path.write_bytes(encode_record(made[0]) + junk + encode_record(made[1]))
    part = PartFile(path)
    assert list(part.records()) == made[:1]
    part.close()


def test_repeated_record_counts_once(tmp_path: Path) -> None:
    made = records(2)
    path = tmp_path / "a"
    path.write_bytes(encode_record(made[0]) + encode_record(replace(made[0], attempt=9)) + encode_record(made[1]))
    part = PartFile(path)
    assert list(part.records()) == made[:1]
    with pytest.raises(AssertionError, match="finished already"):
        part.append(made[0])
    part.close()


def test_part_file_is_synced_every_second_and_when_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    synced: list[float] = []
    monkeypatch.setattr("rollout.run_dir.part_file.os.fsync", lambda descriptor: synced.append(now))
    part = PartFile(tmp_path / "a", clock=lambda: now)
    for step, record in enumerate(records(30)):
        now = step * 0.1
        part.append(record)
    assert len(synced) == 2
    part.close()
    assert len(synced) == 3
