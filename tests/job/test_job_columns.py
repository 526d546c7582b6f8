"""Columns of a run's shards: the input's, and a record's as far as they are wanted."""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.errors import Exit, InputError
from rollout.job.job import run_job
from rollout.records import RECORD_COLUMNS
from rollout.run_dir.paths import RunPaths
from rollout.verify import verify
from tests.support.jobs import FakeEngine, config_of, load_fake, read_records

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"question {i}"}],
        "doc": i,
        "text": "mine",
        "labels": [{"name": "a", "weight": i / 2}, {"name": None, "weight": None}],
        "nothing": None,
        "mixed": i if i % 2 else {"a": [i]},
    }
    for i in range(7)
]
LOGPROBS = {"both": ["logprobs", "sampler_logprobs"], "model": ["logprobs"], "none": []}


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loaded(folder: Path, form: str) -> datasets.Dataset:
    """Read the shards as a user would."""
    builder = {"parquet": "parquet", "jsonl": "json"}[form]
    files = str(folder / "out" / "shards" / f"*.{form}")
    return datasets.load_dataset(builder, data_files=files, split="train", cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("logprobs", LOGPROBS)
def test_input_columns_stand_beside_each_sample(tmp_path: Path, form: str, logprobs: str) -> None:
    config = config_of(
        tmp_path,
        f"data.path={write(tmp_path, ROWS)}",
        f"output.format={form}",
        f"output.logprobs={logprobs}",
        "output.rows_per_shard=3",
        "sampling.n=2",
    )
    with pytest.raises(RuntimeError, match="the engine fails here"):
        run_job(config, load_fake(FakeEngine(fail_after=5)))
    (part,) = RunPaths(tmp_path / "out").parts(0).iterdir()
    assert "question" not in part.read_text()
    assert run_job(config, load_fake()) == Exit.COMPLETE
    assert verify(tmp_path / "out").complete
    rows = loaded(tmp_path, form)
    own = [name for name in RECORD_COLUMNS if not name.endswith("logprobs") or name in LOGPROBS[logprobs]]
    kept = [name if name != "text" else "input_text" for name in ROWS[0]]
    assert rows.column_names == [*own[:2], *kept, *own[2:]]
    assert [row["sample"] for row in rows] == [0, 1] * 7
    for row, source in zip(rows, [row for row in ROWS for _ in range(2)], strict=True):
        assert {name: row[new] for name, new in zip(ROWS[0], kept, strict=True)} == source
        assert row["text"].startswith("é ")
        assert all(len(row[name]) == len(row["completion_ids"]) for name in LOGPROBS[logprobs])


@pytest.mark.parametrize(
    ("override", "key"),
    [("data.keep_columns=[doc]", "data.keep_columns was"), ("output.logprobs=none", 'output.logprobs was "both"')],
)
def test_resume_with_other_columns_is_refused(tmp_path: Path, override: str, key: str) -> None:
    data = f"data.path={write(tmp_path, ROWS)}"
    run_job(config_of(tmp_path, data), load_fake())
    with pytest.raises(InputError, match="another fingerprint") as refusal:
        run_job(config_of(tmp_path, data, override), load_fake())
    assert key in str(refusal.value)


def test_resume_with_other_values_of_kept_columns_is_refused(tmp_path: Path) -> None:
    keep = ("data.keep_columns=[doc]", f"data.path={write(tmp_path, ROWS)}")
    run_job(config_of(tmp_path, *keep), load_fake())
    write(tmp_path, [row | {"text": "not kept"} for row in ROWS])
    assert run_job(config_of(tmp_path, *keep), load_fake()) == Exit.COMPLETE
    write(tmp_path, [row | {"doc": 5} for row in ROWS])
    with pytest.raises(InputError, match=r"data.kept_content"):
        run_job(config_of(tmp_path, *keep), load_fake())


ODD = pa.table(
    {
        "prompt": ["a", "b"],
        "day": [datetime.date(2024, 1, 2), None],
        "at": pa.array([10**15, 0], pa.timestamp("s")),
        "took": pa.array([1500, None], pa.duration("ms")),
        "price": pa.array([decimal.Decimal("1.50"), None]),
        "raw": [b"\xff\x00", None],
        "number": [float("nan"), float("inf")],
        "half": pa.array([1.5, None], pa.float16()),
        "empty": pa.array([{}, None], pa.struct([])),
        "list": pa.array([[{"x": [1.0, float("nan")]}], []]),
        "bad": pa.array([b"\xff a", b"ok"]).view(pa.string()),
    }
)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_values_of_any_type_are_written(tmp_path: Path, form: str) -> None:
    # The empty struct cannot be read from Parquet.
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, ODD.schema) as stream:
        stream.write_table(ODD)
    dataset = datasets.Dataset.from_file(str(tmp_path / "rows.arrow"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    config = config_of(tmp_path, f"data.path={tmp_path / 'saved'}", f"output.format={form}")
    assert run_job(config, load_fake()) == Exit.COMPLETE
    assert verify(tmp_path / "out").complete
    if form == "parquet":
        table = pq.read_table(tmp_path / "out" / "shards" / "00000.parquet")
        assert table.column("empty").to_pylist() == ["{}", None]
        same = [name for name in ODD.column_names if name not in ("empty", "number", "bad", "at", "list")]
        assert table.select(same).to_pylist() == ODD.select(same).to_pylist()
    else:
        first = json.loads((tmp_path / "out" / "shards" / "00000.jsonl").read_text().splitlines()[0])
        assert first["day"] == "2024-01-02"
        assert (first["took"], first["price"], first["raw"], first["half"]) == (1.5, "1.50", "/wA=", 1.5)
        assert (first["number"], first["at"], first["bad"]) == (None, 10**15, "\ufffd a")


def test_wide_rows_are_copied_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.run_dir.commit._BLOCK_BYTES", 2000)
    rows = [{"prompt": str(i), "page": str(i) * 1000} for i in range(5)]
    config = config_of(tmp_path, f"data.path={write(tmp_path, rows)}", "sampling.n=4")
    assert run_job(config, load_fake()) == Exit.COMPLETE
    assert [row["page"] for row in read_records(tmp_path / "out")] == [row["page"] for row in rows for _ in range(4)]
    assert pq.ParquetFile(tmp_path / "out" / "shards" / "00000.parquet").num_row_groups > 1
    assert verify(tmp_path / "out").complete


def test_reasoning_is_a_column_where_it_is_split(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "reasoning": "mine"}]
    config = config_of(tmp_path, f"data.path={write(tmp_path, rows)}", "output.split_reasoning=true")
    assert run_job(config, load_fake()) == Exit.COMPLETE
    assert verify(tmp_path / "out").complete
    columns = loaded(tmp_path, "parquet").column_names
    assert columns[:7] == ["row_id", "sample", "prompt", "input_reasoning", "prompt_ids", "completion_ids", "reasoning"]
    plain = config_of(tmp_path, f"data.path={tmp_path / 'rows.jsonl'}", f"output.dir={tmp_path / 'plain'}")
    assert run_job(plain, load_fake()) == Exit.COMPLETE
    assert read_records(tmp_path / "plain")[0]["reasoning"] == "mine"


UUID = uuid.UUID("12345678-1234-5678-1234-567812345678")
_UUIDS = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([UUID.bytes], pa.binary(16)))
SELDOM: dict[str, tuple[pa.Array, Any]] = {
    "uuid": (_UUIDS, str(UUID)),
    "uuids": (pa.ListArray.from_arrays([0, 1], _UUIDS), json.dumps([str(UUID)])),
    "map": (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), '[["k", 1]]'),
    "texts": (pa.array([["a", "é"]], pa.list_(pa.string_view())), ["a", "é"]),
    "text view": (pa.array(["é"], pa.string_view()), "é"),
    "numbers": (pa.array([[1, 2]], pa.list_view(pa.int64())), [1, 2]),
    "run": (pa.RunEndEncodedArray.from_arrays([1], ["x"]), "x"),
    "flag": (pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1], pa.int8())), True),
    "tensor": (pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((1, 2, 2))), [1.0] * 4),
    "interval": (pa.array([(1, 2, 3)], pa.month_day_nano_interval()), None),
}


def test_values_of_types_that_datasets_does_not_know_can_be_loaded(tmp_path: Path) -> None:
    table = pa.table({"prompt": pa.array(["a"], pa.string_view()), **{name: pair[0] for name, pair in SELDOM.items()}})
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as sink:
        sink.write_table(table)
    assert run_job(config_of(tmp_path, f"data.path={tmp_path / 'rows.arrow'}"), load_fake()) == Exit.COMPLETE
    assert verify(tmp_path / "out").complete
    (row,) = loaded(tmp_path, "parquet")
    found = {name: row[name] for name, pair in SELDOM.items() if pair[1] is not None}
    assert found == {name: value for name, (_, value) in SELDOM.items() if value is not None}
    assert "nanoseconds=3" in row["interval"]
