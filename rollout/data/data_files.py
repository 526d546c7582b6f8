"""Data files: their formats by name, where they lie, and their bytes without compression."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
from fsspec.core import url_to_fs

from rollout.errors import InputError
from rollout.models.errors import first_line

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".arrow": "arrow",
}
"""Format by the suffix of a file's name."""
BOM = b"\xef\xbb\xbf"


def _open_zstd(raw: IO[bytes]) -> IO[bytes]:
    return cast(IO[bytes], io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")))


_DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
#: What compression of text saves at most, as a rule; Parquet is compressed inside.
_EXPANSION = 8


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of input rows, on this machine or at a URL."""

    path: str
    format: str
    compression: str = ""
    """Suffix of the compression, e.g. ``.gz``; empty for none."""

    @property
    def name(self) -> str:
        """The name without the folders, for messages."""
        return PurePosixPath(urlsplit(self.path).path if is_url(self.path) else self.path).name

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open the file for reading, without its compression."""
        with ExitStack() as stack:
            if is_url(self.path):
                fs, path = file_system(self.path)
                stream = stack.enter_context(fs.open(path, "rb"))
            else:
                stream = stack.enter_context(open(self.path, "rb"))
            if self.compression:
                stream = stack.enter_context(_DECOMPRESSORS[self.compression](stream))
            yield cast(IO[bytes], stream)

    def identity(self) -> list[Any]:
        """Return values that change whenever the file does: its name, size, and time or tag."""
        if not is_url(self.path):
            stat = os.stat(self.path)
            return [os.path.abspath(self.path), stat.st_size, stat.st_mtime_ns, stat.st_ino]
        fs, path = file_system(self.path)
        info = fs.info(path)
        tags = ("ETag", "etag", "mtime", "LastModified", "last_modified", "blob_id", "md5Hash", "created")
        return [self.path, info.get("size"), *(str(info.get(tag)) for tag in tags)]

    def expanded_bytes(self) -> float:
        """Return about how many bytes the file holds without compression; infinite if its size is not known."""
        if is_url(self.path):
            fs, path = file_system(self.path)
            size = fs.info(path).get("size")
        else:
            size = os.path.getsize(self.path)
        if size is None:
            return float("inf")
        return float(size * _EXPANSION if self.compression or self.format == "parquet" else size)


class Row(NamedTuple):
    """One row of a file: the line at which it begins, its length there, and its values by column."""

    line: int
    size: int
    values: dict[str, Any]


def not_utf8(file: DataFile, line: int) -> InputError:
    """Return the error for a line that is not UTF-8."""
    return InputError(f"Line {line} of {file.path} cannot be read, as it is not UTF-8: convert the file to UTF-8.")


def is_url(path: str) -> bool:
    """Return whether a path is a URL of another file system than the local one."""
    return "://" in path


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL, and the path in it.

    Raises:
        InputError: nothing is installed that reads such URLs, or the file system refuses.
    """
    protocol = url.partition("://")[0]
    try:
        fs, path = url_to_fs(url)
    except ImportError as error:
        raise InputError(f"data.path={url} cannot be read: {first_line(error)}.") from error
    except ValueError as error:
        raise InputError(f"data.path={url} cannot be read, as {protocol}:// is no known file system.") from error
    return fs, path


def data_file(path: str) -> DataFile | None:
    """Return the data file at a path or URL by its suffixes; None if its format cannot be read."""
    name = PurePosixPath(urlsplit(path).path if path.startswith(("http://", "https://")) else path)
    compression = name.suffix.lower() if name.suffix.lower() in _DECOMPRESSORS else ""
    suffix = Path(name.stem if compression else name.name).suffix.lower()
    kind = FORMATS.get(suffix)
    if kind is None or (compression and kind in ("parquet", "arrow")):
        return None
    return DataFile(path=path, format=kind, compression=compression)
