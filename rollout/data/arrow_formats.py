"""Read Parquet and Arrow files as batches of the columns that are held."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.data.data_files import DataFile
from rollout.data.text_formats import Batch, Choose
from rollout.errors import InputError

ARROW_FORMATS = ("parquet", "arrow")
_ROWS = 2000


def read_arrow_format(file: DataFile, choose: Choose, limit: int | None) -> Iterator[Batch]:
    """Yield the rows of a Parquet or Arrow file.

    Args:
        limit: number of rows after which reading ends; None for all.

    Raises:
        pa.ArrowException, OSError: the file is torn, or no such file.
    """
    with file.open() as stream:
        if file.format == "parquet":
            yield from _first_rows(_parquet(stream, choose, file), limit)
        else:
            yield from _first_rows(_arrow(stream, choose, file), limit)


def as_batches(table: pa.Table, columns: list[str]) -> Iterator[Batch]:
    """Yield a table in pieces; ``columns`` are the names of all that its source has."""
    features = _features(table.schema)
    for piece in table.to_batches(max_chunksize=_ROWS):
        arrays = [
            column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in piece.columns
        ]
        plain = pa.table(arrays, names=piece.schema.names) if arrays else _without_columns(piece.num_rows)
        yield Batch(table=plain, types={}, columns=columns, features=features)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Return what ``datasets`` notes in a schema about its columns."""
    noted = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(noted)["info"]["features"] if noted else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: feature for name, feature in (features or {}).items() if name in schema.names}


def _without_columns(rows: int) -> pa.Table:
    return pa.table({"": pa.nulls(rows)}).select([])


def _first_rows(batches: Iterator[Batch], limit: int | None) -> Iterator[Batch]:
    for batch in batches:
        if limit is None:
            yield batch
            continue
        yield replace(batch, table=batch.table.slice(0, limit))
        limit -= batch.table.num_rows
        if limit <= 0:
            return


def _parquet(stream: IO[bytes], choose: Choose, file: DataFile) -> Iterator[Batch]:
    with pq.ParquetFile(stream) as parquet:
        columns = parquet.schema_arrow.names
        # A leaf's path begins with the name of its column, in which dots are not told from those between fields.
        held = _once(choose(columns), file)
        for batch in parquet.iter_batches(batch_size=_ROWS, columns=held):
            table = pa.Table.from_batches([batch]).select(held).replace_schema_metadata(parquet.schema_arrow.metadata)
            yield from as_batches(table, columns)


def _arrow(stream: IO[bytes], choose: Choose, file: DataFile) -> Iterator[Batch]:
    """Yield the batches of an Arrow stream, or of an Arrow (Feather) file."""
    reader: Any
    try:
        reader = pa.ipc.open_stream(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
        reader = pa.ipc.open_file(stream)
    batches = reader if hasattr(reader, "__next__") else (reader.get_batch(i) for i in range(reader.num_record_batches))
    columns = reader.schema.names
    held = _once(choose(columns), file)
    for batch in batches:
        yield from as_batches(pa.Table.from_batches([batch]).select(held), columns)


def _once(columns: list[str], file: DataFile) -> list[str]:
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise InputError(f"{file.path} has several columns named {twice[0]}: rename all but one.")
    return columns
