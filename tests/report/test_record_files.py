"""Files of records: what the report reads of them, whatever other columns they hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.records import RECORD_COLUMNS, Record
from rollout.report.record_files import RecordFile, UnreadableFile, read_batches, read_records
from rollout.run_dir.file_system import LOCAL
from rollout.run_dir.part_file import PartFile, ShardKey
from rollout.run_dir.paths import RunPaths
from tests.report.test_data_section import record

MIXED: list[dict[str, Any]] = [
    {"x": 1},
    {"x": "one", "meta": {"a": [1, {"b": None}]}},
    {"x": [1, "a"], "big": 2**70},
    {"prompt": "é\u2028" + "x" * 2_000_000},
    {"logprobs": [-math.inf, 0.5, 0.0]},
]


def test_other_columns_of_json_lines_may_have_any_type(tmp_path: Path) -> None:
    rows = [record(row, 0, reward=0.5 * row) | values for row, values in enumerate(MIXED)]
    path = tmp_path / "00000.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = pa.Table.from_batches(list(read_batches(RecordFile(path))))
    assert found["reward"].to_pylist() == [0, 0.5, 1, 1.5, 2]
    assert found["completion_ids"].to_pylist() == [[0, 1, 2]] * 5
    chosen = read_records(RecordFile(path), [1, 3])
    assert chosen[1]["meta"] == MIXED[1]["meta"]
    assert chosen[3]["prompt"] == MIXED[3]["prompt"]
    assert not {"logprobs", "sampler_logprobs"} & set(chosen[1])


def test_part_files_have_the_reasoning(tmp_path: Path) -> None:
    paths, key = RunPaths(tmp_path), ShardKey("digest", 0)
    paths.run.touch()
    part = PartFile(LOCAL, paths, key, "one")
    values = {name: value for name, value in record(0, 0).items() if name in RECORD_COLUMNS}
    part.append(replace(Record(**values), reasoning="because"))
    part.close()
    (found,) = read_records(RecordFile(paths.parts(0), key), [0]).values()
    assert (found["reasoning"], found["text"]) == ("because", values["text"])


def test_records_are_found_in_any_row_group(tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    rows = [{name: value for name, value in record(row, 0).items() if "logprobs" not in name} for row in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    chosen = read_records(RecordFile(path), [0, 6, 7, 55, 99])
    assert {row: values["row_id"] for row, values in chosen.items()} == {row: f"row-{row}" for row in (0, 6, 7, 55, 99)}


def test_values_that_python_cannot_hold_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    body = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"messages": ["a"]}']))
    pq.write_table(pa.table({"day": pa.array([-(10**6)], pa.int32()).cast(pa.date32()), "body": body}), path)
    assert read_records(RecordFile(path), [0]) == {0: {"day": -(10**6), "body": {"messages": ["a"]}}}


@pytest.mark.parametrize("name", ["00000.parquet", "00000.jsonl"])
@pytest.mark.parametrize("content", [b"PAR1 torn", b'{"row_id": "a", "completion_ids": "no list"}\n'])
def test_torn_file_is_unreadable(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableFile):
        list(read_batches(RecordFile(tmp_path / name)))
