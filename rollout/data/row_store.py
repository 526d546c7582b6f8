"""Input rows as Arrow data that is memory-mapped: any range is read in a moment, and memory stays bounded."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import pyarrow as pa

from rollout.data.column_values import JSON, MIXED, has_wide_integers, merge_types, plain_type, python_values, to_type

LINE = "\0line"
"""Column with the line at which an input row begins; no file has a column of this name."""
_ALIGNMENT = 64
_MAGIC = b"rows0002"
_INDEX_END = struct.Struct("<II8s")


@dataclass(frozen=True)
class RowStore:
    """Input rows in order, as tables of which each has its own columns and types.

    Files of one dataset need not agree in their columns and types, so every stretch of rows keeps its own.
    """

    tables: list[pa.Table]
    types: dict[str, pa.DataType]
    """Arrow type of each held column over all rows; `MIXED` where rows have values of different types."""
    columns: list[str]
    """All columns of the dataset, held or not."""
    files: list[tuple[int, str]] = field(default_factory=list)
    """First row and name of each file that has rows."""
    features: dict[str, Any] = field(default_factory=dict)
    """What ``datasets`` wrote into the files about columns, such as which hold images; by column."""
    name: str | None = None
    """Differs between stores with other rows, so that what is computed from them can be kept; None: not known."""

    def __len__(self) -> int:
        return sum(table.num_rows for table in self.tables)

    @property
    def bytes(self) -> int:
        """About how many bytes the rows take."""
        return sum(table.nbytes for table in self.tables)

    def rows_within(self, size: int) -> int:
        """Return how many rows take ``size`` bytes on average; from 1 to 1000."""
        return max(1, min(1000, size * len(self) // max(1, self.bytes)))

    @cached_property
    def _begins(self) -> list[int]:
        return list(accumulate((table.num_rows for table in self.tables), initial=0))[:-1]

    def batches(self, names: Sequence[str], start: int, stop: int, size: int = 1000) -> Iterator[list[dict[str, Any]]]:
        """Yield columns of the rows ``[start, stop)`` as lists of at most ``size`` rows; what a row lacks is None."""
        for low in range(start, min(stop, len(self)), size):
            rows: list[dict[str, Any]] = []
            for part in self._parts(low, min(low + size, stop)):
                missing = [None] * part.num_rows
                held = part.column_names
                columns = [python_values(part.column(name)) if name in held else missing for name in names]
                rows += [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
            yield rows

    def column(self, name: str, start: int, stop: int) -> pa.ChunkedArray:
        """Return a column of the rows ``[start, stop)`` in its type of `types`."""
        kind = self.types[name]
        chunks: list[pa.Array] = []
        for part in self._parts(start, stop):
            if name in part.column_names:
                chunks += to_type(part.column(name), kind).chunks
            else:
                chunks.append(pa.nulls(part.num_rows, kind))
        return pa.chunked_array(chunks, kind)

    def _parts(self, start: int, stop: int) -> Iterator[pa.Table]:
        """Yield the rows ``[start, stop)`` of each table that has some."""
        for begin, table in zip(self._begins, self.tables, strict=True):
            low, high = max(start - begin, 0), min(stop - begin, table.num_rows)
            if low < high:
                yield table.slice(low, high - low)

    def place(self, index: int) -> str:
        """Return the file, and the line or row in it, of an input row; only its number where no file is known."""
        position = bisect_right(self.files, index, key=lambda entry: entry[0]) - 1
        if position < 0:
            return f"input row {index}"
        first, name = self.files[position]
        (row,) = self._parts(index, index + 1)
        if LINE in row.column_names:
            return f"{name} line {row.column(LINE)[0].as_py()}"
        return f"{name} row {index - first + 1}"

    @classmethod
    def of_table(cls, table: pa.Table, columns: list[str], features: dict[str, Any]) -> RowStore:
        """Hold a table that is in memory, or mapped, already."""
        types = {field.name: plain_type(field.type) for field in table.schema}
        return cls(tables=[table], types=types, columns=columns, features=features)

    @classmethod
    def from_buffer(cls, buffer: pa.Buffer) -> RowStore:
        """Open what a `RowWriter` wrote, without copying it.

        Raises:
            ValueError: the buffer holds something else.
        """
        index = read_index(buffer, _MAGIC)
        tables = [pa.ipc.open_stream(buffer.slice(start, size)).read_all() for start, size in index["tables"]]
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(index["types"])))
        return cls(
            tables=tables,
            types={field.name: field.type for field in schema},
            columns=index["columns"],
            files=[(start, name) for start, name in index["files"]],
            features=index["features"],
        )


class RowWriter:
    """Write input rows into one stream of bytes: Arrow IPC streams one after the other, then an index of them."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink
        self._writer: Any = None
        self._schema: pa.Schema | None = None
        self._start = 0
        self._tables: list[tuple[int, int]] = []
        self._files: list[tuple[int, str]] = []
        self._types: dict[str, pa.DataType] = {}
        self._columns: dict[str, None] = {}
        self._features: dict[str, Any] = {}
        self._wide: set[str] = set()
        """Columns with integers that a float does not hold."""
        self.rows = 0

    def begin_file(self, name: str) -> None:
        """Name the file that the next rows come from."""
        if self._files and self._files[-1][0] == self.rows:
            self._files.pop()
        self._files.append((self.rows, name))

    def add_columns(self, names: Iterator[str] | list[str]) -> None:
        """Remember that the dataset has these columns."""
        self._columns.update(dict.fromkeys(names))

    def add_features(self, features: dict[str, Any]) -> None:
        """Remember what a file says about its columns; nothing of a column about which files disagree."""
        for name, feature in features.items():
            if self._features.setdefault(name, feature) != feature:
                self._features[name] = None

    def write(self, table: pa.Table, types: dict[str, pa.DataType]) -> None:
        """Append rows.

        Args:
            types: the Arrow type that the values of a `JSON` column have; `MIXED` if they have several.
        """
        if table.schema != self._schema:
            self._end_table()
            self._start = self._sink.tell()
            self._writer = pa.ipc.new_stream(self._sink, table.schema)
            self._schema = table.schema
        self._writer.write_table(table)
        self.rows += table.num_rows
        for column in table.schema:
            if column.name != LINE:
                found = types.get(column.name, MIXED) if column.type == JSON else plain_type(column.type)
                self._types[column.name] = merge_types(self._types.get(column.name, pa.null()), found)
                if has_wide_integers(table.column(column.name)):
                    self._wide.add(column.name)

    def close(self) -> None:
        """Write the index."""
        self._end_table()
        files = [entry for entry in self._files if entry[0] < self.rows]
        for name in self._wide:
            if pa.types.is_floating(self._types[name]):
                self._types[name] = MIXED
        types = pa.schema([(name, self._types[name]) for name in self._columns if name in self._types])
        index = {
            "tables": self._tables,
            "files": files,
            "columns": list(self._columns),
            "features": {name: feature for name, feature in self._features.items() if feature is not None},
            "types": base64.b64encode(types.serialize().to_pybytes()).decode(),
        }
        write_index(self._sink, index, _MAGIC)

    def _end_table(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        self._tables.append((self._start, self._sink.tell() - self._start))
        self._sink.write(b"\0" * (-self._sink.tell() % _ALIGNMENT))


def write_index(sink: Any, index: dict[str, Any], magic: bytes) -> None:
    """End a file with a JSON object, its length and checksum, and eight bytes that name the kind of file."""
    text = json.dumps(index).encode()
    sink.write(text + _INDEX_END.pack(len(text), zlib.crc32(text), magic))


def read_index(buffer: pa.Buffer, magic: bytes) -> dict[str, Any]:
    """Return the object that `write_index` wrote.

    Raises:
        ValueError: the buffer does not end with one.
    """
    end = len(buffer) - _INDEX_END.size
    if end < 0:
        raise ValueError("it is too short")
    length, crc32, found = _INDEX_END.unpack(buffer.slice(end))
    if found != magic or length > end:
        raise ValueError("it does not end as such a file does")
    text = buffer.slice(end - length, length).to_pybytes()
    if zlib.crc32(text) != crc32:
        raise ValueError("the checksum of its index differs")
    index = json.loads(text)
    if not isinstance(index, dict):
        raise ValueError("its index is no object")
    return index
