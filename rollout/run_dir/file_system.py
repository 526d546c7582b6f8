"""The file operations that a run's directory is made of, and the ways of writing that survive a crash at any of them.

Everything that a run writes goes through a `FileSystem`, so that tests can let each operation fail, lose what was not
flushed, or show it late to other machines.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar


class FileSystem(Protocol):
    """Operations on files; all raise `OSError` as those of `os` do."""

    def read(self, path: Path) -> bytes:
        """Return a file's content."""

    def names(self, folder: Path) -> list[str]:
        """Return the names in a folder, in no order."""

    def exists(self, path: Path) -> bool:
        """Return whether a file or folder has this name."""

    def size(self, path: Path) -> int:
        """Return a file's bytes."""

    def same(self, path: Path, other: Path) -> bool:
        """Return whether two names are those of one file."""

    def make_folder(self, path: Path) -> None:
        """Create a folder and those above it; it may exist. Others may remove some of them at the same time."""

    def open_new(self, path: Path) -> BinaryIO:
        """Create a file, which must not exist, for writing.

        Raises:
            FileExistsError: it exists.
        """

    def open_read(self, path: Path) -> BinaryIO:
        """Open a file for reading."""

    def sync(self, file: BinaryIO) -> None:
        """Flush a file's content to the disk."""

    def sync_folder(self, folder: Path) -> None:
        """Flush the names in a folder to the disk; flushing a file does not flush its name."""

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name, which must not exist.

        Raises:
            FileExistsError: it exists.
        """

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file; a file that has the new name is replaced."""

    def remove(self, path: Path) -> None:
        """Remove a file's name; there may be none."""

    def remove_folder(self, path: Path) -> None:
        """Remove a folder and all in it; there may be none. What others add at the same time may stay."""


_TRIES = 5


class LocalFileSystem:
    """A file system that this machine has mounted, local or not."""

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def names(self, folder: Path) -> list[str]:
        return os.listdir(folder)

    def exists(self, path: Path) -> bool:
        return path.exists()

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def same(self, path: Path, other: Path) -> bool:
        return path.samefile(other)

    def make_folder(self, path: Path) -> None:
        for _ in range(_TRIES - 1):
            try:
                return path.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError:
                # One above it was removed after it was found or made.
                continue
        return path.mkdir(parents=True, exist_ok=True)

    def open_new(self, path: Path) -> BinaryIO:
        return open(path, "xb")

    def open_read(self, path: Path) -> BinaryIO:
        return open(path, "rb")

    def sync(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        # Not rmtree: others may remove the same files, or add some, at this moment.
        for name in names_in(self, path):
            inner = path / name
            try:
                inner.unlink(missing_ok=True)
            except IsADirectoryError:
                self.remove_folder(inner)
        try:
            path.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise


LOCAL: FileSystem = LocalFileSystem()

T = TypeVar("T")
Write = Callable[[BinaryIO], T]


def names_in(files: FileSystem, folder: Path) -> list[str]:
    """Return the names in a folder, in no order; none if there is no such folder."""
    try:
        return files.names(folder)
    except FileNotFoundError:
        return []


def contents(data: bytes) -> Write[int]:
    """Return what writes these bytes."""
    return lambda file: file.write(data)


def write_new(files: FileSystem, path: Path, write: Write[T]) -> T:
    """Let ``write`` fill a new file, and flush it to the disk. A file that an earlier life left there is replaced.

    Args:
        path: a name that no other process uses.

    Returns:
        What ``write`` returns.
    """
    files.make_folder(path.parent)
    files.remove(path)
    with files.open_new(path) as file:
        returned = write(file)
        files.sync(file)
    return returned


def put(files: FileSystem, path: Path, temporary: Path, write: Write[T]) -> T:
    """Write a file that appears complete or not at all, even after a power cut; it replaces one that is there.

    Args:
        temporary: a name on the same file system that no other process uses.

    Returns:
        What ``write`` returns.
    """
    returned = write_new(files, temporary, write)
    files.rename(temporary, path)
    files.sync_folder(path.parent)
    return returned


def put_first(files: FileSystem, path: Path, temporary: Path, write: Write[object]) -> bool:
    """Write a file as `put` does, unless one is there: the first of several writers wins.

    Returns:
        Whether this one is in place.
    """
    write_new(files, temporary, write)
    first = link_first(files, temporary, path)
    files.remove(temporary)
    return first


def link_first(files: FileSystem, source: Path, path: Path) -> bool:
    """Give a file the name ``path`` as well, unless another has it, and return whether it has the name now."""
    try:
        files.link(source, path)
    except FileExistsError:
        # Over NFS, a link whose answer was lost is made again and finds itself.
        if not files.same(source, path):
            return False
    files.sync_folder(path.parent)
    return True


def see_afresh(files: FileSystem, folder: Path) -> None:
    """See what other machines did in a folder: over NFS, one that changes a folder is told of its state."""
    changed = folder / f".{secrets.token_hex(4)}"
    files.open_new(changed).close()
    files.remove(changed)
