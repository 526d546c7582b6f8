"""Read JSON, CSV and text files as batches of columns, with every value as it stands in the file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import IO, Any

import pyarrow as pa

from rollout.data.column_values import to_arrow
from rollout.data.csv_rows import csv_rows
from rollout.data.data_files import BOM, DataFile, Row, not_utf8
from rollout.data.json_rows import json_rows
from rollout.data.row_store import LINE

logger = logging.getLogger(__name__)

_ROWS = 2000
_CHARACTERS = 1 << 22
"""A batch has at most this many rows, and ends with the row that passes this number of characters."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a file: the columns that are held, and the names of all."""

    table: pa.Table
    types: dict[str, pa.DataType]
    """Arrow type of the values of each column."""
    columns: list[str]
    features: dict[str, Any] = field(default_factory=dict)
    """What ``datasets`` wrote into the file about its columns."""


Choose = Callable[[list[str]], list[str]]
"""Picks the columns that are held from those that a file has."""


def read_text_format(
    file: DataFile, choose: Choose, limit: int | None, once: Container[str], text_column: str
) -> Iterator[Batch]:
    """Yield the rows of a JSON, CSV or text file.

    Args:
        limit: number of rows after which reading ends; None for all.
        once: columns that a header must not have twice.
        text_column: column of the lines of a text file.

    Raises:
        InputError: the file has another form; the message names the line.
    """
    with file.open() as stream:
        if file.format == "txt":
            rows = _text_rows(stream, file, text_column)
        elif file.format in ("csv", "tsv"):
            rows = csv_rows(stream, file, "\t" if file.format == "tsv" else ",", once)
        else:
            rows = json_rows(stream, file)
        with closing(rows):
            yield from _batches(islice(rows, limit), choose)


def _batches(rows: Iterable[Row], choose: Choose) -> Iterator[Batch]:
    """Gather rows, each with its line and its size, into batches."""
    lines: list[int] = []
    gathered: list[dict[str, Any]] = []
    characters = 0
    for row in rows:
        lines.append(row.line)
        gathered.append(row.values)
        characters += row.size
        if len(gathered) == _ROWS or characters >= _CHARACTERS:
            yield _batch(lines, gathered, choose)
            lines, gathered, characters = [], [], 0
    if gathered:
        yield _batch(lines, gathered, choose)


def _batch(lines: list[int], rows: list[dict[str, Any]], choose: Choose) -> Batch:
    columns = list(dict.fromkeys(chain.from_iterable(rows)))
    arrays: dict[str, pa.Array] = {}
    types: dict[str, pa.DataType] = {}
    for name in choose(columns):
        arrays[name], types[name] = to_arrow([row.get(name) for row in rows])
    return Batch(table=pa.table({**arrays, LINE: pa.array(lines, pa.int64())}), types=types, columns=columns)


def _text_rows(stream: IO[bytes], file: DataFile, column: str) -> Generator[Row, None, None]:
    """Yield each line that is not blank, without its end."""
    blank = 0
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(BOM)
        try:
            text = line.removesuffix(b"\n").removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise not_utf8(file, number) from error
        if text.strip():
            yield Row(number, len(line), {column: text})
        else:
            blank += 1
    if blank:
        logger.warning("Skipped %d blank line(s) of %s.", blank, file.name)
