"""Digests of files: of one that is being written, and of one that is there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from rollout.run_dir.file_system import LOCAL, FileSystem

_READ_BYTES = 1 << 20


class HashedFile:
    """A file that is being written, with its size and its digest; whoever opened it flushes and closes it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.bytes = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._digest.update(data)
        size = len(memoryview(data).cast("B"))
        self.bytes += size
        return size

    def hexdigest(self) -> str:
        return self._digest.hexdigest()

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        """Do nothing: the whole file is flushed once."""

    def close(self) -> None:
        """Do nothing: whoever opened the file closes it."""


def file_sha256(path: Path, files: FileSystem = LOCAL) -> str:
    """Return the SHA-256 digest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with files.open_read(path) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
