"""Rows of CSV and TSV files, every field as text."""

from __future__ import annotations

import csv
import io
import logging
import re
import sys
from collections import Counter
from collections.abc import Container, Generator
from itertools import chain
from typing import IO

from rollout.data.data_files import DataFile, Row, not_utf8
from rollout.errors import InputError

logger = logging.getLogger(__name__)

_NAMES = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_NAMED_DELIMITER = re.compile(r"\"?sep=([^\r\n])\"?[\r\n]+")


def csv_rows(stream: IO[bytes], file: DataFile, delimiter: str, once: Container[str]) -> Generator[Row, None, None]:
    """Yield the rows below the header; a field that a short row lacks is missing.

    The header may show that another delimiter is used, and a line ``sep=;`` may name it, as Excel writes it.

    Args:
        delimiter: the usual one of such files.
        once: columns that the header must not have twice.

    Raises:
        InputError: a row has more fields than the header, or a quoted field is broken; the message names the line.
    """
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    names: list[str] | None = None
    line = 1
    try:
        first = text.readline()
        if named := _NAMED_DELIMITER.fullmatch(first):
            delimiter, first, line = named[1], text.readline(), 2
        else:
            delimiter = _delimiter(first, delimiter, once, file)
        reader = csv.reader(chain([first], text), delimiter=delimiter, strict=True)
        before = line - 1
        for fields in reader:
            begin, line = line, before + reader.line_num + 1
            if not fields:
                continue
            if names is None:
                names = _header(fields, file, once)
                continue
            if len(fields) > len(names) and any(fields[len(names) :]):
                raise InputError(
                    f"Line {begin} of {file.path} has {len(fields)} fields, but its header has {len(names)}: "
                    f"put quotes around a field with a {_NAMES.get(delimiter, repr(delimiter))} in it."
                )
            row = dict(zip(names, fields, strict=False))
            yield Row(begin, sum(map(len, fields)), row)
    except csv.Error as error:
        raise InputError(
            f"Line {line} of {file.path} begins a row with a broken quoted field ({error}): close each quote, "
            "and write a quote inside a quoted field twice."
        ) from error
    except UnicodeDecodeError as error:
        raise not_utf8(file, _first_bad_line(file)) from error
    finally:
        # The caller closes the stream.
        text.detach()


def _delimiter(header: str, usual: str, names: Container[str], file: DataFile) -> str:
    """Return the delimiter of a header: another one than usual if only that one divides it."""
    if header.strip().strip('"') in names:
        return usual
    counts = {delimiter: len(next(csv.reader([header], delimiter=delimiter), [])) for delimiter in (usual, *_NAMES)}
    found = max(counts, key=lambda delimiter: counts[delimiter])
    if counts[usual] > 1 or counts[found] < 2:
        return usual
    logger.warning(
        "The fields of %s are divided by a %s, as its header has no %s.", file.name, _NAMES[found], _NAMES[usual]
    )
    return found


def _header(fields: list[str], file: DataFile, once: Container[str]) -> list[str]:
    """Name the columns as pandas does: one without a name by its position, a repeated name by its number."""
    seen: Counter[str] = Counter()
    names: list[str] = []
    for index, name in enumerate(fields):
        name = name or f"Unnamed: {index}"
        if seen[name] and name in once:
            raise InputError(f"{file.path} has several columns named {name}: rename all but one.")
        names.append(f"{name}.{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def _first_bad_line(file: DataFile) -> int:
    """Return the first line that is not UTF-8: text is decoded ahead of the rows."""
    with file.open() as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError(f"{file.path} is UTF-8 now")
