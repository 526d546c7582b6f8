"""Open files of a simulated disk."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from tests.support.simulated_inodes import File

if TYPE_CHECKING:
    from tests.support.simulated_files import SimulatedFiles


class _Handle(io.RawIOBase):
    def __init__(self, process: SimulatedFiles, file: File) -> None:
        self.file = file
        self.process = process
        self.position = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position}.get(whence)
        if start is None:
            start = len(self.process.read_content(self.file))
        self.position = start + offset
        return self.position


class WriteHandle(_Handle):
    mode = "xb"

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed and self.process.alive:
            self.file.content.publish()
        super().close()

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        written = bytes(data)
        self.process.write_content(self.file, self.position, written)
        self.position += len(written)
        return len(written)


class ReadHandle(_Handle):
    mode = "rb"

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray, /) -> int:  # type: ignore[override]
        data = self.process.read_content(self.file)[self.position : self.position + len(buffer)]
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
