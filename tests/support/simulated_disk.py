"""A file system in memory that several machines mount; it loses and delays what real ones lose and delay.

A `SimulatedDisk` is what all machines share; a `SimulatedFiles` is one process's view of it. What is done on one
machine is seen at once there. Another machine may see a name appear, change or go only up to ``delay`` seconds later,
unless it changes the same folder, and what was written to a file as well, until the file is flushed or closed; creating
exclusively, linking, renaming and removing are decided by the disk. NFS promises as much. At a power cut all that was
not flushed may be lost: content since the file's last `sync`, names since their folder's last `sync_folder`.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.support.simulated_files import SimulatedFiles
from tests.support.simulated_inodes import Change, File, Folder, History, Inode


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
        self.root = Folder()
        self._changes: deque[Change] = deque()
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

    def change(self, machine: str, entries: list[tuple[Folder, str, Inode | None]]) -> None:
        """Change names, as one operation that a process of a machine makes."""
        change = Change(entries)
        self._changes.append(change)
        for folder, name, inode in entries:
            if change not in folder.pending:
                folder.pending.append(change)
            folder.fresh[machine] = self.now
            if name in folder.names:
                folder.names[name].put(inode, machine, self.now, self.delay)
            else:
                # Absent until now for those who see it late.
                history: History[Inode | None] = History(None, "", -math.inf)
                history.put(inode, machine, self.now, self.delay)
                folder.names[name] = history

    def flush_names(self, folder: Folder) -> None:
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
            folder.names = {name: History(inode, "", -math.inf) for name, inode in folder.durable.items()}
            folders += [inode for inode in folder.durable.values() if isinstance(inode, Folder)]

    def _lose_writes(self, file: File) -> None:
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
        file.content = History(file.durable, "", -math.inf)

    def _survivors(self, count: int) -> set[int]:
        """Return which of some changes in a row survive: none, the first few, or any."""
        if self.rng.random() < 0.25:
            return set()
        if self.rng.random() < 0.5:
            return set(range(self.rng.randint(0, count)))
        return {number for number in range(count) if self.rng.random() < 0.5}

    def _files(self) -> list[File]:
        folders, files = [self.root], dict[File, None]()
        for folder in folders:
            for inode in folder.inodes().values():
                if isinstance(inode, Folder):
                    folders.append(inode)
                else:
                    files[inode] = None
        return list(files)
