"""Write the records of a shard as Parquet or JSON lines, block by block."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rollout.record_columns import as_utf8
from rollout.records import Record
from rollout.run_dir.json_values import json_value
from rollout.run_dir.record_table import table_of


class Block(NamedTuple):
    """Records that are written together, and their input columns, if there are any."""

    records: Sequence[Record]
    kept: pa.Table | None


def _write_parquet(blocks: Iterable[Block], schema: pa.Schema, file: Any) -> None:
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for records, kept in blocks:
            writer.write_table(table_of(records, schema, kept))


def _write_jsonl(blocks: Iterable[Block], schema: pa.Schema, file: Any) -> None:
    for records, kept in blocks:
        inputs = () if kept is None else kept.column_names
        for number, record in enumerate(records):
            values = {
                name: json_value(kept.column(name)[number])
                if kept is not None and name in inputs
                else _plain(getattr(record, name))
                for name in schema.names
            }
            line = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
            file.write(as_utf8(line).encode() + b"\n")


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


WRITERS: dict[str, Callable[[Iterable[Block], pa.Schema, Any], None]] = {
    "parquet": _write_parquet,
    "jsonl": _write_jsonl,
}
"""By ``output.format``; the file has a ``write`` method."""
