"""Who works on which shard."""

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
    """Hands out shards, each to one worker at a time."""

    def claim(self) -> int | None:
        """A shard that nobody works on and that is not committed, now this worker's; None where there is none."""

    def release(self, index: int, committed: bool) -> None:
        """Give a claimed shard back, with its work done or not."""


class FileLocks:
    """Claims by ``flock`` on a file a shard, which the kernel frees when a process dies, however it dies.

    So a killed job can go on at once. Of the shards that are not committed, a worker holds at most its share at a
    time: an engine with room for all of a small run would claim all of it while the other workers still load.

    On network file systems this needs servers and mounts that pass locks
    on (NFS 4, Lustre with ``flock``); where they do not, workers on different machines must not share a run.
    """

    def __init__(self, paths: RunPaths, shards: int, workers: int = 1) -> None:
        self._paths = paths
        self._shards = shards
        self._workers = workers
        self._open = list(range(shards))
        """Shards that are neither held here nor known to be committed."""
        self._held: dict[int, int] = {}
        """The file descriptor of each lock held."""

    def claim(self) -> int | None:
        if len(self._held) >= self._share():
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
                # Committed between the two looks.
                unlock(self._paths.lock(index), descriptor, remove=True)
                continue
            self._held[index] = descriptor
            return index
        return None

    def _share(self) -> int:
        committed = sum(1 for file in self._paths.shards.iterdir() if file.suffix == ".json")
        return max(1, math.ceil((self._shards - committed) / self._workers))

    def release(self, index: int, committed: bool) -> None:
        unlock(self._paths.lock(index), self._held.pop(index), remove=committed)
        if not committed:
            self._open.insert(0, index)


def try_lock(path: Path) -> int | None:
    """Lock a file, made if need be, and return its descriptor; None if another holds it."""
    return _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, waiting for it as long as it takes."""
    descriptor = _lock(path, fcntl.LOCK_EX)
    assert descriptor is not None
    try:
        yield
    finally:
        unlock(path, descriptor, remove=False)


def unlock(path: Path, descriptor: int, remove: bool) -> None:
    """Free a lock. The file goes before the lock does, so that nobody locks it in between and then loses it."""
    if remove:
        path.unlink(missing_ok=True)
    os.close(descriptor)


def _lock(path: Path, how: int) -> int | None:
    while True:
        # The folder of locks goes when a run is complete, possibly just now.
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _is_still(path, descriptor):
            return descriptor
        # Removed by the one who held it: a lock on a file without a name keeps nobody out.
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
