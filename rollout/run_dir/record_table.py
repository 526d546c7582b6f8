"""The columns of a run's shards, and records as a table of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rollout.records import REASONING, Record
from rollout.run_dir.json_values import json_value

SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string()),
        pa.field("sample", pa.int32()),
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("completion_ids", pa.list_(pa.int32())),
        pa.field("text", pa.string()),
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("sampler_logprobs", pa.list_(pa.float32())),
        pa.field("finish_reason", pa.string()),
        pa.field("error_class", pa.string()),
        pa.field("error", pa.string()),
        pa.field("reward", pa.float32()),
        pa.field("seed", pa.int64()),
        pa.field("weight_version", pa.int32()),
        pa.field("attempt", pa.int32()),
    ]
)


#: The columns that each value of `output.logprobs` leaves out.
ABSENT_LOGPROBS = {"both": (), "model": ("sampler_logprobs",), "none": ("logprobs", "sampler_logprobs")}


class KeptRows(NamedTuple):
    """The input columns of a shard's rows, and the row of each record in them."""

    table: pa.Table
    indices: Sequence[int]


def shard_schema(kept: pa.Schema, form: str, absent: Sequence[str] = (), split_reasoning: bool = False) -> pa.Schema:
    """Return the schema of a run's shards: the columns of a record, with the kept input columns after the first two.

    Input columns whose type Parquet cannot hold become JSON text.

    Args:
        absent: columns of a record that the run does not write.
        split_reasoning: whether reasoning has a column of its own.
    """
    inputs = [
        field.with_type(pa.string()) if form == "parquet" and not _fits_parquet(field) else field for field in kept
    ]
    columns = [field for field in SCHEMA if field.name not in absent]
    if split_reasoning:
        columns.insert(SCHEMA.get_field_index("text"), pa.field(REASONING, pa.string()))
    return pa.schema([*columns[:2], *inputs, *columns[2:]], metadata=kept.metadata)


def describe_columns(schema: pa.Schema, form: str) -> dict[str, str]:
    """Return the type of each column; in Parquet, as it is read again."""
    return {field.name: str(field.type) for field in (_as_stored(schema) if form == "parquet" else schema)}


def _fits_parquet(field: pa.Field) -> bool:
    try:
        _as_stored(pa.schema([field]))
    except pa.ArrowNotImplementedError:
        return False
    return True


def _as_stored(schema: pa.Schema) -> pa.Schema:
    """Return a schema after Parquet stored it, which renames the elements of lists and has fewer units of time."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    return pq.read_schema(pa.BufferReader(sink.getvalue()))


def as_utf8(text: str) -> str:
    """Return a text with U+FFFD for each lone surrogate, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
    return text


def table_of(records: Sequence[Record], schema: pa.Schema = SCHEMA, kept: pa.Table | None = None) -> pa.Table:
    """Convert records into a table.

    Args:
        kept: the input columns among those of the schema, with one row per record.
    """
    inputs = () if kept is None else kept.column_names
    return pa.Table.from_arrays(
        [
            _input_column(kept.column(field.name), field) if field.name in inputs else _column(records, field)
            for field in schema
        ],
        schema=schema,
    )


def _input_column(values: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray | pa.Array:
    if values.type == field.type:
        return values
    return pa.array([json.dumps(json_value(value)) if value.is_valid else None for value in values], pa.string())


def _column(records: Sequence[Record], field: pa.Field) -> pa.Array:
    values: list[Any] = [getattr(record, field.name) for record in records]
    if pa.types.is_string(field.type):
        return pa.array([as_utf8(value) for value in values], field.type)
    if not pa.types.is_list(field.type):
        return pa.array(values, field.type)
    dtype = field.type.value_type.to_pandas_dtype()
    flat = np.concatenate([np.empty(0, dtype), *(np.asarray(value, dtype) for value in values)])
    return pa.ListArray.from_arrays(_offsets(values), pa.array(flat), type=field.type)


def _offsets(values: Iterable[Sequence[Any]]) -> pa.Array:
    return pa.array(np.cumsum([0, *(len(value) for value in values)]), pa.int32())
