"""Copy a shard with other values in some columns; all else stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.models.errors import first_line
from rollout.record_columns import as_utf8

_LINES = 256
"""Lines of a file that are changed together."""

Change = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
"""Takes the read columns of some records, and returns the columns of each that change."""


def rewrite(source: Path, target: Any, *, read: Sequence[str], change: Change) -> None:
    """Copy a shard, a row group or some lines at a time.

    Args:
        target: has a ``write`` method.
        read: the columns that ``change`` gets.
        change: called with all records, in order.

    Raises:
        ValueError: the shard cannot be read.
    """
    try:
        (_rewrite_parquet if source.suffix == ".parquet" else _rewrite_lines)(source, target, read, change)
    except (KeyError, pa.ArrowException) as error:
        raise ValueError(f"{source} cannot be read: {first_line(error)}.") from error


def _rewrite_parquet(source: Path, target: Any, read: Sequence[str], change: Change) -> None:
    with pq.ParquetFile(source) as file, pq.ParquetWriter(target, file.schema_arrow, compression="zstd") as writer:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            changed = change(table.select(list(read)).to_pylist())
            for name in changed[0] if changed else ():
                at = table.schema.get_field_index(name)
                field = table.schema.field(at)
                values = [record[name] for record in changed]
                texts = pa.types.is_string(field.type)
                table = table.set_column(at, field, pa.array([*map(as_utf8, values)] if texts else values, field.type))
            writer.write_table(table)


def _rewrite_lines(source: Path, target: Any, read: Sequence[str], change: Change) -> None:
    with open(source, "rb") as file:
        while lines := [json.loads(line) for line in islice(file, _LINES)]:
            changed = change([{name: line[name] for name in read} for line in lines])
            for line, values in zip(lines, changed, strict=True):
                text = json.dumps(line | values, ensure_ascii=False, separators=(",", ":"))
                target.write(f"{as_utf8(text)}\n".encode())
