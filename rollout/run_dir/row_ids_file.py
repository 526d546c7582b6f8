"""A run's own copy of the ids of all input rows, so that it can be verified without its dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from rollout.errors import InputError
from rollout.models.errors import first_line
from rollout.run_dir.file_system import LOCAL, FileSystem, put
from rollout.run_dir.hashed_file import HashedFile, file_sha256

_SCHEMA = pa.schema([("row_id", pa.string())])
_CHUNK = 1 << 16
"""Ids of a record batch; so many are held at a time."""


def write_row_ids(files: FileSystem, path: Path, temporary: Path, ids: Sequence[str]) -> str:
    """Write the ids as an Arrow IPC file, which appears complete or not at all.

    Args:
        temporary: a name on the same file system that no other process uses.

    Returns:
        The SHA-256 digest of the file, in hexadecimal.
    """

    def write(file: BinaryIO) -> str:
        hashed = HashedFile(file)
        with pa.ipc.new_file(pa.PythonFile(hashed, mode="w"), _SCHEMA) as writer:
            for start in range(0, len(ids), _CHUNK):
                chunk = pa.array(ids[start : start + _CHUNK], pa.string())
                writer.write_batch(pa.record_batch([chunk], schema=_SCHEMA))
        return hashed.hexdigest()

    return put(files, path, temporary, write)


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
    try:
        found = file_sha256(path, files)
    except OSError as error:
        raise InputError(f"{path}, the ids of the input rows, cannot be read: {first_line(error)}.") from error
    if found != sha256:
        raise InputError(
            f"{path}, the ids of the input rows, is damaged, and not the shards: its sha256 is not the one in run.json."
        )
