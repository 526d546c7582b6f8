"""A file system in memory that several machines mount; it loses and delays what real ones lose and delay.

A `SimulatedDisk` is what all machines share; `SimulatedFiles` is one process's view of it. What is done on one machine
is seen at once there. Another machine may see a name appear, change or go only up to ``delay`` seconds later, unless it
changes the same folder, and what was written to a file as well, until the file is flushed or closed; creating
exclusively, linking, renaming and removing are decided by the disk. NFS promises as much. At a power cut all that was
not flushed may be lost: content since the file's last `sync`, names since their folder's last `sync_folder`.
"""

from __future__ import annotations

import errno
import io
import math
import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar, cast

T = TypeVar("T")

_TRIES = 5
"""How often a folder is made again while others remove those above it."""


class ProcessDied(BaseException):
    """The process that called has died; nothing that it does from here on has an effect."""


@dataclass(slots=True)
class _Version(Generic[T]):
    value: T
    machine: str
    time: float
    visible: dict[str, float] = field(default_factory=dict)
    """When each other machine sees it."""


class _History(Generic[T]):
    """A value, and what other machines may still believe it to be."""

    __slots__ = ("_versions",)

    def __init__(self, value: T, machine: str, now: float) -> None:
        self._versions = [_Version(value, machine, now)]

    @property
    def latest(self) -> T:
        return self._versions[-1].value

    def put(self, value: T, machine: str, now: float, delay: float) -> None:
        if not delay:
            self._versions.clear()
        # What no machine believes any longer is forgotten.
        while len(self._versions) > 1 and self._versions[1].time <= now - delay:
            del self._versions[0]
        self._versions.append(_Version(value, machine, now))

    def publish(self) -> None:
        """Let all machines see the latest value."""
        del self._versions[:-1]
        self._versions[0].time = -math.inf

    def settled(self, now: float, delay: float) -> bool:
        """Return whether all machines see the latest value."""
        return self._versions[-1].time <= now - delay

    def tell(self, machine: str) -> None:
        """Let a machine know the latest value: the disk has just decided by it."""
        self._versions[-1].visible[machine] = 0.0

    def view(self, machine: str, now: float, delay: float, rng: random.Random, fresh: float = -math.inf) -> T:
        """Return the newest value that a machine has seen, of ``fresh`` or later."""
        for version in reversed(self._versions):
            if version.machine == machine or version.time <= max(now - delay, fresh):
                return version.value
            visible = version.visible.get(machine)
            if visible is None:
                share = rng.choice((0.0, rng.random(), 1.0))
                visible = version.visible[machine] = version.time + share * delay
            if visible <= now:
                return version.value
        return self._versions[0].value


@dataclass(slots=True)
class _Write:
    offset: int
    data: bytes
    machine: str


@dataclass(eq=False, slots=True)
class _File:
    content: _History[bytes]
    durable: bytes = b""
    """What was flushed."""
    writes: list[_Write] = field(default_factory=list)
    """Writes since, in their order."""


@dataclass(eq=False, slots=True)
class _Folder:
    names: dict[str, _History[_Inode | None]] = field(default_factory=dict)
    durable: dict[str, _Inode] = field(default_factory=dict)
    """The names that were flushed, and all changes before them."""
    pending: list[_Change] = field(default_factory=list)
    """Changes since the folder was flushed."""
    removed: bool = False
    fresh: dict[str, float] = field(default_factory=dict)
    """When each machine last changed a name, and saw what others had changed."""

    def inodes(self) -> dict[str, _Inode]:
        return {name: inode for name, history in self.names.items() if (inode := history.latest) is not None}


_Inode = _File | _Folder


@dataclass(eq=False, slots=True)
class _Change:
    """A change of one name, or of two in a rename; it survives a power cut as a whole or not at all."""

    entries: list[tuple[_Folder, str, _Inode | None]]
    flushed: bool = False

    def apply(self) -> None:
        for folder, name, inode in self.entries:
            if inode is None:
                folder.durable.pop(name, None)
            else:
                folder.durable[name] = inode


class SimulatedDisk:
    """The files that all processes share, and the time.

    Args:
        rng: decides what is seen late and what a power cut loses.
        delay: seconds within which a machine sees what another has done.
    """

    def __init__(self, rng: random.Random, delay: float = 0.0) -> None:
        self.rng = rng
        self.delay = delay
        self.now = 0.0
        """Seconds; whoever runs the simulation adds to it."""
        self.root = _Folder()
        self._changes: deque[_Change] = deque()
        """Changes of names that are not on the disk, or come after one that is not."""
        self._processes: list[SimulatedFiles] = []

    def process(self, machine: str = "", turn: Callable[[str], None] | None = None) -> SimulatedFiles:
        """Start a process on a machine.

        Args:
            turn: called with the name of an operation before each that the process makes.
        """
        process = SimulatedFiles(self, machine, turn)
        self._processes.append(process)
        return process

    @contextmanager
    def seen_at_once(self) -> Iterator[SimulatedFiles]:
        """See all changes in a process of an observer, however late others see them."""
        delay, self.delay = self.delay, 0.0
        try:
            yield self.process("observer")
        finally:
            self.delay = delay

    def power_cut(self, machine: str | None = None) -> None:
        """Kill all processes and lose, at random, what was not flushed.

        Args:
            machine: only this one loses its power: the content that it wrote and did not flush may be lost, while
                names are those of the disk's own machine.
        """
        for process in self._processes:
            if machine is None or process.machine == machine:
                process.kill()
        self._processes = [process for process in self._processes if process.alive]
        if machine is None:
            self._lose_names()
        for file in self._files():
            if file.writes and (machine is None or any(write.machine == machine for write in file.writes)):
                self._lose_writes(file)

    def change(self, machine: str, entries: list[tuple[_Folder, str, _Inode | None]]) -> None:
        """Change names, as one operation that a process of a machine makes."""
        change = _Change(entries)
        self._changes.append(change)
        for folder, name, inode in entries:
            if change not in folder.pending:
                folder.pending.append(change)
            folder.fresh[machine] = self.now
            if name in folder.names:
                folder.names[name].put(inode, machine, self.now, self.delay)
            else:
                # Absent until now for those who see it late.
                history: _History[_Inode | None] = _History(None, "", -math.inf)
                history.put(inode, machine, self.now, self.delay)
                folder.names[name] = history

    def flush_names(self, folder: _Folder) -> None:
        for change in folder.pending:
            change.flushed = True
        folder.pending.clear()
        while self._changes and self._changes[0].flushed:
            self._changes.popleft().apply()

    def _lose_names(self) -> None:
        kept = self._survivors(len(self._changes))
        for number, change in enumerate(self._changes):
            if change.flushed or number in kept:
                change.apply()
        self._changes.clear()
        folders = [self.root]
        for folder in folders:
            folder.pending.clear()
            folder.names = {name: _History(inode, "", -math.inf) for name, inode in folder.durable.items()}
            folders += [inode for inode in folder.durable.values() if isinstance(inode, _Folder)]

    def _lose_writes(self, file: _File) -> None:
        content = bytearray(file.durable)
        kept = self._survivors(len(file.writes))
        for number, write in enumerate(file.writes):
            data = write.data
            if number in kept:
                if len(data) > 1 and number == max(kept) and self.rng.random() < 0.5:
                    data = data[: self.rng.randrange(1, len(data))]
                # A write that survives where an earlier one did not leaves zeros in its place.
                content.extend(bytes(max(0, write.offset - len(content))))
                content[write.offset : write.offset + len(data)] = data
        file.writes.clear()
        file.durable = bytes(content)
        file.content = _History(file.durable, "", -math.inf)

    def _survivors(self, count: int) -> set[int]:
        """Return which of some changes in a row survive: none, the first few, or any."""
        if self.rng.random() < 0.25:
            return set()
        if self.rng.random() < 0.5:
            return set(range(self.rng.randint(0, count)))
        return {number for number in range(count) if self.rng.random() < 0.5}

    def _files(self) -> list[_File]:
        folders, files = [self.root], dict[_File, None]()
        for folder in folders:
            for inode in folder.inodes().values():
                if isinstance(inode, _Folder):
                    folders.append(inode)
                else:
                    files[inode] = None
        return list(files)


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
                inode = _Folder()
                self._disk.change(self.machine, [(folder, name, inode)])
            if not isinstance(inode, _Folder):
                raise _error(errno.EEXIST if depth == len(path.parts) else errno.ENOTDIR, path)
            folder = inode
        return True

    def open_new(self, path: Path) -> BinaryIO:
        self.begin("open_new")
        folder = self._folder_for(path)
        if self._latest(folder, path.name) is not None:
            raise _error(errno.EEXIST, path)
        file = _File(_History(b"", self.machine, self._disk.now))
        self._disk.change(self.machine, [(folder, path.name, file)])
        return io.BufferedWriter(_WriteHandle(self, file))

    def open_read(self, path: Path) -> BinaryIO:
        self.begin("open_read")
        return io.BufferedReader(_ReadHandle(self, self._view_file(path)))

    def sync(self, file: BinaryIO) -> None:
        file.flush()
        self.begin("sync")
        handle = cast(io.BufferedWriter, file).raw
        assert isinstance(handle, _WriteHandle)
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
        if isinstance(inode, _Folder):
            raise _error(errno.EPERM, source)
        self._disk.change(self.machine, [(folder, target.name, inode)])

    def rename(self, source: Path, target: Path) -> None:
        self.begin("rename")
        from_folder, to_folder = self._view_folder(source.parent), self._folder_for(target)
        inode = self._latest(from_folder, source.name)
        if inode is None:
            raise _error(errno.ENOENT, source)
        assert isinstance(inode, _File), f"{source} is no file"
        replaced = self._latest(to_folder, target.name)
        if isinstance(replaced, _Folder):
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
        if isinstance(inode, _Folder):
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
        if isinstance(folder, _Folder) and not folder.inodes():
            folder.removed = True
            self._disk.change(self.machine, [(parent, path.name, None)])

    def write_content(self, file: _File, offset: int, data: bytes) -> None:
        """Write to an open file; not an operation of the protocol."""
        self.begin("write")
        content = file.content.latest
        content = content[:offset].ljust(offset, b"\0") + data + content[offset + len(data) :]
        file.content.put(content, self.machine, self._disk.now, self._disk.delay)
        file.writes.append(_Write(offset, data, self.machine))

    def read_content(self, file: _File) -> bytes:
        """Return an open file's content; not an operation of the protocol."""
        self.begin("read")
        return self._view_content(file)

    def _view_content(self, file: _File) -> bytes:
        disk = self._disk
        return file.content.view(self.machine, disk.now, disk.delay, disk.rng)

    def _latest(self, folder: _Folder, name: str) -> _Inode | None:
        """Return what has a name on the disk, which the machine knows from now on."""
        history = folder.names.get(name)
        if history is None:
            return None
        history.tell(self.machine)
        return history.latest

    def _view_names(self, folder: _Folder) -> list[str]:
        disk = self._disk
        for name, history in tuple(folder.names.items()):
            if history.latest is None and history.settled(disk.now, disk.delay):
                del folder.names[name]
        return [name for name in folder.names if self._view_name(folder, name) is not None]

    def _view_name(self, folder: _Folder, name: str) -> _Inode | None:
        disk = self._disk
        history = folder.names.get(name)
        if history is None:
            return None
        fresh = folder.fresh.get(self.machine, -math.inf)
        return history.view(self.machine, disk.now, disk.delay, disk.rng, fresh)

    def _view(self, path: Path) -> _Inode:
        inode: _Inode = self._disk.root
        for name in path.parts[1:]:
            if not isinstance(inode, _Folder):
                raise _error(errno.ENOTDIR, path)
            found = self._view_name(inode, name)
            if found is None:
                raise _error(errno.ENOENT, path)
            inode = found
        return inode

    def _folder_for(self, path: Path) -> _Folder:
        """Return the folder in which a name is to be made."""
        folder = self._view_folder(path.parent)
        if folder.removed:
            raise _error(errno.ENOENT, path)
        return folder

    def _view_folder(self, path: Path) -> _Folder:
        inode = self._view(path)
        if not isinstance(inode, _Folder):
            raise _error(errno.ENOTDIR, path)
        return inode

    def _view_file(self, path: Path) -> _File:
        inode = self._view(path)
        if not isinstance(inode, _File):
            raise _error(errno.EISDIR, path)
        return inode


class _Handle(io.RawIOBase):
    def __init__(self, process: SimulatedFiles, file: _File) -> None:
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


class _WriteHandle(_Handle):
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


class _ReadHandle(_Handle):
    mode = "rb"

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray, /) -> int:  # type: ignore[override]
        data = self.process.read_content(self.file)[self.position : self.position + len(buffer)]
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
