"""A simulated disk as one process sees it, which may die at any operation."""

from __future__ import annotations

import errno
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from tests.support.simulated_handles import ReadHandle, WriteHandle
from tests.support.simulated_inodes import File, Folder, History, Inode, Write

if TYPE_CHECKING:
    from tests.support.simulated_disk import SimulatedDisk

_TRIES = 5
"""How often a folder is made again while others remove those above it."""


class ProcessDied(BaseException):
    """The process that called has died; nothing that it does from here on has an effect."""


class SimulatedFiles:
    """A `FileSystem`: the disk as one process of one machine sees it."""

    def __init__(self, disk: SimulatedDisk, machine: str, turn: Callable[[str], None] | None) -> None:
        self.machine = machine
        self.alive = True
        self._disk = disk
        self._turn = turn

    def kill(self) -> None:
        """Let the process die: what it wrote stays, what it has not yet handed to the system is lost."""
        self.alive = False

    def begin(self, operation: str) -> None:
        """Begin an operation; other processes may have their turn first.

        Raises:
            ProcessDied: the process has died.
        """
        if self.alive and self._turn is not None:
            self._turn(operation)
        if not self.alive:
            raise ProcessDied

    def read(self, path: Path) -> bytes:
        self.begin("read")
        return self._view_content(self._view_file(path))

    def names(self, folder: Path) -> list[str]:
        self.begin("names")
        return self._view_names(self._view_folder(folder))

    def exists(self, path: Path) -> bool:
        self.begin("exists")
        try:
            self._view(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def size(self, path: Path) -> int:
        self.begin("size")
        return len(self._view_content(self._view_file(path)))

    def same(self, path: Path, other: Path) -> bool:
        self.begin("same")
        return self._view(path) is self._view(other)

    def make_folder(self, path: Path) -> None:
        for _ in range(_TRIES):
            if self._make_folders(path):
                return
        raise _error(errno.ENOENT, path)

    def _make_folders(self, path: Path) -> bool:
        """Return False if one of them was removed meanwhile."""
        folder = self._disk.root
        for depth, name in enumerate(path.parts[1:], 2):
            self.begin("make_folder")
            if folder.removed:
                return False
            inode = self._latest(folder, name)
            if inode is None:
                inode = Folder()
                self._disk.change(self.machine, [(folder, name, inode)])
            if not isinstance(inode, Folder):
                raise _error(errno.EEXIST if depth == len(path.parts) else errno.ENOTDIR, path)
            folder = inode
        return True

    def open_new(self, path: Path) -> BinaryIO:
        self.begin("open_new")
        folder = self._folder_for(path)
        if self._latest(folder, path.name) is not None:
            raise _error(errno.EEXIST, path)
        file = File(History(b"", self.machine, self._disk.now))
        self._disk.change(self.machine, [(folder, path.name, file)])
        return io.BufferedWriter(WriteHandle(self, file))

    def open_read(self, path: Path) -> BinaryIO:
        self.begin("open_read")
        return io.BufferedReader(ReadHandle(self, self._view_file(path)))

    def sync(self, file: BinaryIO) -> None:
        file.flush()
        self.begin("sync")
        handle = cast(io.BufferedWriter, file).raw
        assert isinstance(handle, WriteHandle)
        handle.file.durable = handle.file.content.latest
        handle.file.writes.clear()
        handle.file.content.publish()

    def sync_folder(self, folder: Path) -> None:
        self.begin("sync_folder")
        self._disk.flush_names(self._view_folder(folder))

    def link(self, source: Path, target: Path) -> None:
        self.begin("link")
        inode = self._view(source)
        folder = self._folder_for(target)
        if self._latest(folder, target.name) is not None:
            raise _error(errno.EEXIST, target)
        if isinstance(inode, Folder):
            raise _error(errno.EPERM, source)
        self._disk.change(self.machine, [(folder, target.name, inode)])

    def rename(self, source: Path, target: Path) -> None:
        self.begin("rename")
        from_folder, to_folder = self._view_folder(source.parent), self._folder_for(target)
        inode = self._latest(from_folder, source.name)
        if inode is None:
            raise _error(errno.ENOENT, source)
        assert isinstance(inode, File), f"{source} is no file"
        replaced = self._latest(to_folder, target.name)
        if isinstance(replaced, Folder):
            raise _error(errno.ENOTEMPTY if target in source.parents else errno.EISDIR, target)
        # Two names of one file both stay.
        if replaced is not inode:
            self._disk.change(self.machine, [(from_folder, source.name, None), (to_folder, target.name, inode)])

    def remove(self, path: Path) -> None:
        self.begin("remove")
        try:
            folder = self._view_folder(path.parent)
        except FileNotFoundError:
            return
        inode = self._latest(folder, path.name)
        if isinstance(inode, Folder):
            raise _error(errno.EISDIR, path)
        if inode is not None:
            self._disk.change(self.machine, [(folder, path.name, None)])

    def remove_folder(self, path: Path) -> None:
        try:
            names = self.names(path)
        except FileNotFoundError:
            names = []
        for name in names:
            inner = path / name
            try:
                self.remove(inner)
            except IsADirectoryError:
                self.remove_folder(inner)
        self.begin("remove_folder")
        try:
            parent = self._view_folder(path.parent)
        except FileNotFoundError:
            return
        folder = self._latest(parent, path.name)
        # Others may have added something.
        if isinstance(folder, Folder) and not folder.inodes():
            folder.removed = True
            self._disk.change(self.machine, [(parent, path.name, None)])

    def write_content(self, file: File, offset: int, data: bytes) -> None:
        """Write to an open file; not an operation of the protocol."""
        self.begin("write")
        content = file.content.latest
        content = content[:offset].ljust(offset, b"\0") + data + content[offset + len(data) :]
        file.content.put(content, self.machine, self._disk.now, self._disk.delay)
        file.writes.append(Write(offset, data, self.machine))

    def read_content(self, file: File) -> bytes:
        """Return an open file's content; not an operation of the protocol."""
        self.begin("read")
        return self._view_content(file)

    def _view_content(self, file: File) -> bytes:
        disk = self._disk
        return file.content.view(self.machine, disk.now, disk.delay, disk.rng)

    def _latest(self, folder: Folder, name: str) -> Inode | None:
        """Return what has a name on the disk, which the machine knows from now on."""
        history = folder.names.get(name)
        if history is None:
            return None
        history.tell(self.machine)
        return history.latest

    def _view_names(self, folder: Folder) -> list[str]:
        disk = self._disk
        for name, history in tuple(folder.names.items()):
            if history.latest is None and history.settled(disk.now, disk.delay):
                del folder.names[name]
        return [name for name in folder.names if self._view_name(folder, name) is not None]

    def _view_name(self, folder: Folder, name: str) -> Inode | None:
        disk = self._disk
        history = folder.names.get(name)
        if history is None:
            return None
        fresh = folder.fresh.get(self.machine, -math.inf)
        return history.view(self.machine, disk.now, disk.delay, disk.rng, fresh)

    def _view(self, path: Path) -> Inode:
        inode: Inode = self._disk.root
        for name in path.parts[1:]:
            if not isinstance(inode, Folder):
                raise _error(errno.ENOTDIR, path)
            found = self._view_name(inode, name)
            if found is None:
                raise _error(errno.ENOENT, path)
            inode = found
        return inode

    def _folder_for(self, path: Path) -> Folder:
        """Return the folder in which a name is to be made."""
        folder = self._view_folder(path.parent)
        if folder.removed:
            raise _error(errno.ENOENT, path)
        return folder

    def _view_folder(self, path: Path) -> Folder:
        inode = self._view(path)
        if not isinstance(inode, Folder):
            raise _error(errno.ENOTDIR, path)
        return inode

    def _view_file(self, path: Path) -> File:
        inode = self._view(path)
        if not isinstance(inode, File):
            raise _error(errno.EISDIR, path)
        return inode


def _error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
