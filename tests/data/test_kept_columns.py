"""Input columns in the output: which are kept, under which names, with which types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.data.kept_columns import KeptColumns
from rollout.data.prompts import read_prompts
from rollout.errors import InputError
from tests.support.jobs import config_of


def kept(tmp_path: Path, rows: list[dict[str, Any]], *overrides: str, name: str = "rows.jsonl") -> KeptColumns:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(config_of(tmp_path, f"data.path={tmp_path / name}", *overrides).data).kept


ROW = {"prompt": "a", "doc": 7, "source": "wiki"}


@pytest.mark.parametrize(
    ("keep", "names"),
    [
        ("all", ["prompt", "doc", "source"]),
        ("[]", []),
        ("doc", ["doc"]),
        ("[source,prompt,source]", ["source", "prompt"]),
    ],
)
def test_columns_are_kept_as_configured(tmp_path: Path, keep: str, names: list[str]) -> None:
    columns = kept(tmp_path, [ROW, ROW | {"doc": 8}], f"data.keep_columns={keep}")
    assert columns.schema.names == names
    assert columns.table(1, 2).to_pylist() == ([{name: (ROW | {"doc": 8})[name] for name in names}] if names else [])


def test_column_of_a_record_gets_a_prefix(tmp_path: Path) -> None:
    columns = kept(tmp_path, [ROW | {"text": "mine", "reward": 0.5}])
    assert columns.table(0, 1).to_pylist() == [ROW | {"input_text": "mine", "input_reward": 0.5}]


@pytest.mark.parametrize("keep", ["nope", "[doc,nope]"])
def test_unknown_column_is_refused(tmp_path: Path, keep: str) -> None:
    with pytest.raises(InputError, match=r"data.keep_columns names nope, .* it has prompt, doc, source"):
        kept(tmp_path, [ROW], f"data.keep_columns={keep}")


@pytest.mark.parametrize("keep", ["null", "1", "[1]", "true", "''", "{a: 1}"])
def test_value_that_is_no_list_of_columns_is_refused(tmp_path: Path, keep: str) -> None:
    with pytest.raises(InputError, match=r"data.keep_columns is"):
        kept(tmp_path, [ROW], f"data.keep_columns={keep}")


def test_name_that_clashes_with_its_prefix_is_refused(tmp_path: Path) -> None:
    rows = [ROW | {"text": "a", "input_text": "b"}]
    with pytest.raises(InputError, match=r"data.keep_columns: the input column text would be written as input_text"):
        kept(tmp_path, rows)
    assert kept(tmp_path, rows, "data.keep_columns=[text]").schema.names == ["input_text"]


def test_digest_depends_on_names_types_and_values_alone(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "n": i, "l": [{"a": i}] * (i % 3)} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=77)
    config = config_of(tmp_path, f"data.path={tmp_path / 'rows.parquet'}").data
    digest = kept(tmp_path, rows).digest()
    assert read_prompts(config).kept.digest() == digest
    assert kept(tmp_path, [*rows[:-1], rows[-1] | {"n": 1}]).digest() != digest
    assert kept(tmp_path, rows, "data.keep_columns=[prompt,n]").digest() != digest
    assert kept(tmp_path, rows, "data.limit=2499").digest() != digest


def test_images_are_kept_without_being_decoded(tmp_path: Path) -> None:
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    image = {"bytes": b"no image", "path": None}
    table = pa.Table.from_pylist([{"prompt": "a", "image": image}], schema=features.arrow_schema)
    pq.write_table(table, tmp_path / "rows.parquet")
    prompts = read_prompts(config_of(tmp_path, f"data.path={tmp_path / 'rows.parquet'}").data)
    assert prompts.kept.table(0, 1).column("image").to_pylist() == [image]
    assert datasets.Features.from_arrow_schema(prompts.kept.schema)["image"] == datasets.Image()
    assert [row.prompt for row in prompts.rows(0, 1)] == ["a"]
