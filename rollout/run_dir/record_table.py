"""The columns of a run's shards, and records as a table of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.record_columns import SCHEMA, column_of
from rollout.records import REASONING, REF_LOGPROBS, Record
from rollout.run_dir.json_values import json_value


class KeptRows(NamedTuple):
    """The input columns of a shard's rows, and the row of each record in them."""

    table: pa.Table
    indices: Sequence[int]

    def taken(self, start: int, stop: int) -> pa.Table:
        """Return the columns of the records ``[start, stop)``."""
        return self.table.take(pa.array(self.indices[start:stop], pa.int64()))


def shard_schema(
    kept: pa.Schema, form: str, absent: Sequence[str] = (), split_reasoning: bool = False, reference: bool = False
) -> pa.Schema:
    """Return the schema of a run's shards: the columns of a record, with the kept input columns after the first two.

    Input columns whose type Parquet or ``datasets`` cannot hold become JSON text.

    Args:
        absent: columns of a record that the run does not write.
        split_reasoning: whether reasoning has a column of its own.
        reference: whether the log-probabilities of a reference model have one.
    """
    inputs = [
        field.with_type(pa.string()) if form == "parquet" and not _can_be_loaded(field) else field for field in kept
    ]
    columns = [field for field in SCHEMA if field.name not in absent]
    if split_reasoning:
        columns.insert(SCHEMA.get_field_index("text"), pa.field(REASONING, pa.string()))
    if reference:
        at = next(i for i, field in enumerate(columns) if field.name == "finish_reason")
        columns.insert(at, pa.field(REF_LOGPROBS, pa.list_(pa.float32())))
    return pa.schema([*columns[:2], *inputs, *columns[2:]], metadata=kept.metadata)


def describe_columns(schema: pa.Schema, form: str) -> dict[str, str]:
    """Return the type of each column; in Parquet, as it is read again."""
    return {field.name: str(field.type) for field in (_as_stored(schema) if form == "parquet" else schema)}


def _can_be_loaded(field: pa.Field) -> bool:
    """Return whether ``load_dataset`` reads a column from a Parquet file."""
    import datasets

    try:
        datasets.Features.from_arrow_schema(_as_stored(pa.schema([field])))
    except (pa.ArrowNotImplementedError, ValueError):
        return False
    return True


def _as_stored(schema: pa.Schema) -> pa.Schema:
    """Return a schema after Parquet stored it, which renames the elements of lists and has fewer units of time."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    return pq.read_schema(pa.BufferReader(sink.getvalue()))


def table_of(records: Sequence[Record], schema: pa.Schema = SCHEMA, kept: pa.Table | None = None) -> pa.Table:
    """Convert records into a table.

    Args:
        kept: the input columns among those of the schema, with one row per record.
    """
    inputs = pa.table({}) if kept is None else kept
    return pa.Table.from_arrays(
        [
            _input_column(inputs.column(field.name), field)
            if field.name in inputs.column_names
            else column_of(records, field)
            for field in schema
        ],
        schema=schema,
    )


def _input_column(values: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray | pa.Array:
    if values.type == field.type:
        return values
    return pa.array([json.dumps(json_value(value)) if value.is_valid else None for value in values], pa.string())
