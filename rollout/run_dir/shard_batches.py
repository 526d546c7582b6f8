"""Read a shard's records in batches, so that no shard is ever held whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.models.errors import first_line
from rollout.record_columns import SCHEMA
from rollout.run_dir.file_system import LOCAL, FileSystem
from rollout.run_dir.shards import REQUIRED, UNREADABLE, check_schema

_BATCH_RECORDS = 4096
_BATCH_BYTES = 1 << 24
"""A batch of JSON lines ends early with this much text."""


def read_batches(path: Path, columns: Sequence[str], files: FileSystem = LOCAL) -> Iterator[pa.Table]:
    """Yield columns of a record in the declared types, a batch of records at a time, in the order of the file.

    Raises:
        ValueError: the file cannot be read, has not the columns of a record, or lacks values other than rewards.
    """
    try:
        with files.open_read(path) as file:
            for table in (_parquet if path.suffix == ".parquet" else _json_lines)(file, list(columns)):
                empty = [name for name in columns if table.column(name).null_count and name != "reward"]
                if empty:
                    raise ValueError(f"it has records without {', '.join(empty)}")
                yield table
    except UNREADABLE as error:
        raise ValueError(first_line(error)) from error


def _parquet(file: BinaryIO, columns: list[str]) -> Iterator[pa.Table]:
    parquet = pq.ParquetFile(file)
    check_schema(parquet.schema_arrow)
    for batch in parquet.iter_batches(_BATCH_RECORDS, columns=columns):
        yield pa.Table.from_batches([batch])


def _json_lines(file: BinaryIO, columns: list[str]) -> Iterator[pa.Table]:
    names: list[str] | None = None
    records: list[dict[str, Any]] = []
    size = 0
    for number, line in enumerate(file, 1):
        record = json.loads(line)
        if not isinstance(record, dict) or list(record) != (names or list(record)) or not record.keys() >= REQUIRED:
            raise ValueError(f"line {number} does not have the declared columns")
        for name in columns:
            if not _has_type(record[name], SCHEMA.field(name).type):
                raise ValueError(f"line {number} has a {name} that is no {SCHEMA.field(name).type}")
        names = names or list(record)
        records.append(record)
        size += len(line)
        if len(records) == _BATCH_RECORDS or size >= _BATCH_BYTES:
            yield _table(records, columns)
            records, size = [], 0
    if records:
        yield _table(records, columns)


def _table(records: Sequence[dict[str, Any]], columns: list[str]) -> pa.Table:
    return pa.table({name: pa.array([record[name] for record in records], SCHEMA.field(name).type) for name in columns})


def _has_type(value: Any, kind: pa.DataType) -> bool:
    """Return whether a value of JSON has a column's type; Arrow would cut 1.5 to the integer 1."""
    if value is None:
        return True
    if pa.types.is_list(kind):
        return type(value) is list and set(map(type, value)) <= {int}
    if pa.types.is_string(kind):
        return type(value) is str
    return type(value) is int or (pa.types.is_floating(kind) and type(value) is float)
