"""A run's own copy of the ids of all input rows, so that it can be verified without its dataset."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from rollout.errors import InputError
from rollout.models.errors import first_line
from rollout.run_dir.file_system import LOCAL, FileSystem, write_new

_SCHEMA = pa.schema([("row_id", pa.string())])
_CHUNK = 1 << 16
"""Ids of a record batch; so many are held at a time."""
_READ_BYTES = 1 << 20


def write_row_ids(files: FileSystem, path: Path, temporary: Path, ids: Sequence[str]) -> str:
    """Write the ids as an Arrow IPC file, which appears complete or not at all.

    Args:
        temporary: a name on the same file system that no other process uses.

    Returns:
        The SHA-256 digest of the file, in hexadecimal.
    """
    digest = hashlib.sha256()

    def write(file: BinaryIO) -> None:
        hashed = _Hashed(file, digest)
        with pa.ipc.new_file(pa.PythonFile(hashed, mode="w"), _SCHEMA) as writer:
            for start in range(0, len(ids), _CHUNK):
                chunk = pa.array(ids[start : start + _CHUNK], pa.string())
                writer.write_batch(pa.record_batch([chunk], schema=_SCHEMA))

    write_new(files, temporary, write)
    files.rename(temporary, path)
    files.sync_folder(path.parent)
    return digest.hexdigest()


def read_row_ids(path: Path) -> pa.ChunkedArray:
    """Map the ids of all input rows, in order.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        if table.schema != _SCHEMA:
            raise InputError(f"{path}, the ids of the input rows, has the columns {', '.join(table.column_names)}.")
        # Arrow follows the offsets of a mapped file unchecked.
        table.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}, the ids of the input rows, cannot be read: {first_line(error)}.") from error
    return table.column("row_id")


def check_row_ids(path: Path, sha256: str, files: FileSystem = LOCAL) -> None:
    """Refuse a file of ids that is not the one which was written.

    Raises:
        InputError: it is missing or damaged.
    """
    digest = hashlib.sha256()
    try:
        with files.open_read(path) as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}, the ids of the input rows, cannot be read: {first_line(error)}.") from error
    if digest.hexdigest() != sha256:
        raise InputError(
            f"{path}, the ids of the input rows, is damaged, and not the shards: its sha256 is not the one in run.json."
        )


class _Hashed(io.RawIOBase):
    """Passes bytes on to a file, which it leaves open, and hashes them."""

    def __init__(self, file: BinaryIO, digest: hashlib._Hash) -> None:
        super().__init__()
        self._file = file
        self._digest = digest

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._file.write(view)
        return len(view)
