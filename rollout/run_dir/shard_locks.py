"""Locks on shards: each shard is worked on by one worker at a time."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rollout.run_dir.paths import RunPaths


class ShardLocks(Protocol):
    """Hand out shards, each to one worker at a time."""

    def claim(self) -> int | None:
        """Lock a shard that is neither locked nor committed, and return its index; None if there is none."""

    def release(self, index: int, committed: bool) -> None:
        """Release a claimed shard, committed or not."""


class FileLocks:
    """Locks by ``flock`` on one file per shard; the kernel releases them whenever a process dies.

    A killed job can therefore resume at once. A worker holds at most its share of the uncommitted shards: otherwise an
    engine with room for a whole small run would claim all of it while the other workers are still loading.

    On network file systems, servers and mounts must forward locks (NFS 4, Lustre with ``flock``); where they do not,
    workers on different machines must not share a run.
    """

    def __init__(self, paths: RunPaths, shards: int, workers: int = 1) -> None:
        self._paths = paths
        self._shards = shards
        self._workers = workers
        self._open = list(range(shards))
        """Shards neither held by this worker nor known to be committed."""
        self._held: dict[int, int] = {}
        """The file descriptor of each lock held."""

    def claim(self) -> int | None:
        if len(self._held) >= self._most_held():
            return None
        for index in tuple(self._open):
            if self._paths.manifest(index).exists():
                self._open.remove(index)
                continue
            descriptor = try_lock(self._paths.lock(index))
            if descriptor is None:
                continue
            self._open.remove(index)
            if self._paths.manifest(index).exists():
                # Committed between the first check and the lock.
                unlock(self._paths.lock(index), descriptor, remove=True)
                continue
            self._held[index] = descriptor
            return index
        return None

    def _most_held(self) -> int:
        """Return how many shards this worker may hold: its share of the uncommitted ones, at least one."""
        committed = sum(1 for file in self._paths.shards.iterdir() if file.suffix == ".json")
        return max(1, math.ceil((self._shards - committed) / self._workers))

    def release(self, index: int, committed: bool) -> None:
        unlock(self._paths.lock(index), self._held.pop(index), remove=committed)
        if not committed:
            self._open.insert(0, index)


def try_lock(path: Path) -> int | None:
    """Lock a file, creating it if needed, and return its descriptor; None if it is locked already."""
    return _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file; wait until it is free."""
    descriptor = _lock(path, fcntl.LOCK_EX)
    assert descriptor is not None
    try:
        yield
    finally:
        unlock(path, descriptor, remove=False)


def unlock(path: Path, descriptor: int, remove: bool) -> None:
    """Release a lock. ``remove`` deletes the file first, so that no process locks a file about to be deleted."""
    if remove:
        path.unlink(missing_ok=True)
    os.close(descriptor)


def _lock(path: Path, operation: int) -> int | None:
    while True:
        # A worker that completes the run removes the folder of locks, possibly at this moment.
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _is_file_at(path, descriptor):
            return descriptor
        # The previous holder removed the file: a lock on a file without a name excludes no process.
        os.close(descriptor)


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
