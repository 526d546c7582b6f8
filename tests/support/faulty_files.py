"""A file system of which one operation fails, or in which the process dies there.

Operations are the calls of the `FileSystem` protocol, and the writes, flushes, reads and closings of the files that it
opens; they are numbered from 1 as they are made.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar, cast

from rollout.run_dir.file_system import FileSystem
from tests.support.simulated_files import ProcessDied

T = TypeVar("T")

_TAKES_SPACE = {"write", "flush", "close", "sync", "open_new", "link", "rename", "make_folder", "sync_folder"}


class Fault(Enum):
    """What happens at an operation."""

    EIO = "it fails, and nothing is done"
    EIO_DONE = "it fails, but it is done"
    ENOSPC = "the disk is full; of a write, the first half is done"
    GONE = "it fails, as all after it do"
    DIES = "the process dies before it"
    DIES_MIDWAY = "the process dies in the middle of a write or of removing a folder, or after another operation"


class FaultyFiles:
    """A `FileSystem` over another.

    Args:
        number: of the operation at which the fault happens; None for none.
        on_death: called when the process dies.
    """

    def __init__(
        self,
        files: FileSystem,
        number: int | None = None,
        fault: Fault = Fault.EIO,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.operations: list[str] = []
        """The names of all operations made, in order."""
        self.happened = False
        """Whether the fault has happened."""
        self._files = files
        self._number = number
        self._fault = fault
        self._on_death = on_death
        self.dead = False
        """Whether the process has died."""
        # Kept, since a file that is collected writes what it holds without an operation.
        self._opened: list[BinaryIO] = []

    def read(self, path: Path) -> bytes:
        return self.operate("read", lambda: self._files.read(path))

    def names(self, folder: Path) -> list[str]:
        return self.operate("names", lambda: self._files.names(folder))

    def exists(self, path: Path) -> bool:
        return self.operate("exists", lambda: self._files.exists(path))

    def size(self, path: Path) -> int:
        return self.operate("size", lambda: self._files.size(path))

    def same(self, path: Path, other: Path) -> bool:
        return self.operate("same", lambda: self._files.same(path, other))

    def make_folder(self, path: Path) -> None:
        self.operate("make_folder", lambda: self._files.make_folder(path))

    def open_new(self, path: Path) -> BinaryIO:
        return self._wrap(self.operate("open_new", lambda: self._files.open_new(path)))

    def open_read(self, path: Path) -> BinaryIO:
        return self._wrap(self.operate("open_read", lambda: self._files.open_read(path)))

    def sync(self, file: BinaryIO) -> None:
        assert isinstance(file, _FaultyFile)
        self.operate("sync", lambda: self._files.sync(file.inner))

    def sync_folder(self, folder: Path) -> None:
        self.operate("sync_folder", lambda: self._files.sync_folder(folder))

    def link(self, source: Path, target: Path) -> None:
        self.operate("link", lambda: self._files.link(source, target))

    def rename(self, source: Path, target: Path) -> None:
        self.operate("rename", lambda: self._files.rename(source, target))

    def remove(self, path: Path) -> None:
        self.operate("remove", lambda: self._files.remove(path))

    def remove_folder(self, path: Path) -> None:
        def half() -> None:
            names = sorted(self._files.names(path)) if self._files.exists(path) else []
            for name in names[: len(names) // 2]:
                try:
                    self._files.remove(path / name)
                except IsADirectoryError:
                    self._files.remove_folder(path / name)

        self.operate("remove_folder", lambda: self._files.remove_folder(path), half)

    def operate(self, name: str, do: Callable[[], T], half: Callable[[], object] | None = None) -> T:
        """Make an operation, unless it is the one at which the fault happens.

        Args:
            half: does half of it.
        """
        if self.dead:
            raise ProcessDied
        self.operations.append(name)
        number = len(self.operations)
        if self.happened and self._fault is Fault.GONE:
            raise _error(errno.EIO)
        if number != self._number or (self._fault is Fault.ENOSPC and name not in _TAKES_SPACE):
            return do()
        self.happened = True
        if self._fault in (Fault.DIES, Fault.DIES_MIDWAY):
            if self._fault is Fault.DIES_MIDWAY:
                (half or do)()
            self.dead = True
            self._on_death()
            raise ProcessDied
        if self._fault is Fault.EIO_DONE:
            do()
        if self._fault is Fault.ENOSPC:
            if half is not None:
                half()
            raise _error(errno.ENOSPC)
        raise _error(errno.EIO)

    def _wrap(self, file: BinaryIO) -> BinaryIO:
        self._opened.append(file)
        return cast(BinaryIO, _FaultyFile(self, file))


class _FaultyFile:
    """A file whose writes, flushes, reads and closing are operations."""

    def __init__(self, files: FaultyFiles, inner: BinaryIO) -> None:
        self.inner = inner
        self._files = files

    @property
    def closed(self) -> bool:
        return self.inner.closed

    @property
    def mode(self) -> str:
        return "rb" if self.inner.readable() else "wb"

    def write(self, data: bytes) -> int:
        half = len(data) // 2

        def write_half() -> None:
            self.inner.write(data[:half])
            self.inner.flush()

        return self._files.operate("write", lambda: self.inner.write(data), write_half)

    def flush(self) -> None:
        self._files.operate("flush", self.inner.flush)

    def read(self, size: int = -1) -> bytes:
        return self._files.operate("read", lambda: self.inner.read(size))

    def readline(self) -> bytes:
        return self._files.operate("read", self.inner.readline)

    def close(self) -> None:
        if not self.inner.closed and not self._files.dead:
            self._files.operate("close", self.inner.close)

    def readable(self) -> bool:
        return self.inner.readable()

    def writable(self) -> bool:
        return self.inner.writable()

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.inner.seek(offset, whence)

    def tell(self) -> int:
        return self.inner.tell()

    def __enter__(self) -> _FaultyFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[bytes]:
        while line := self.readline():
            yield line


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
