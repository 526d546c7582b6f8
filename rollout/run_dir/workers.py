"""The workers of a run: how each shows that it is alive, and how the others tell."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rollout.run_dir.file_system import FileSystem, contents, names_in, write_new
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run_folders import put_unflushed
from rollout.run_dir.sealed_json import seal, unseal

BEATS_PER_LEASE = 8
"""Heartbeats in the time after which a silent worker counts as dead."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One process that works on a run, in one attempt."""

    writer: str
    """Names the worker in all files; no two ever have the same."""
    host: str
    boot: str
    """The boot of the host, and the namespace of its process numbers: within both, they name processes."""
    pid: int
    started: str
    """When the process started, in the kernel's ticks since the boot: numbers of processes are used again."""
    task: str = ""
    """The SLURM task that this is a life of; empty elsewhere."""
    life: int = 0
    """How often SLURM has restarted the task."""

    @classmethod
    def of_process(cls, attempt: int, rank: int, environment: Mapping[str, str]) -> Worker:
        """Describe this process."""
        pid = os.getpid()
        return cls(
            writer=f"{attempt:05d}-{rank:05d}-{secrets.token_hex(3)}",
            host=socket.gethostname(),
            boot=_boot(),
            pid=pid,
            started=_started(pid) or "",
            task=_slurm_task(environment),
            life=int(environment.get("SLURM_RESTART_COUNT") or 0),
        )

    @property
    def attempt(self) -> int:
        return attempt_of(self.writer)

    def is_gone(self, observer: Worker) -> bool:
        """Return whether the worker is known to be dead, without waiting for its silence."""
        if self.task and self.task == observer.task and self.life < observer.life:
            return True
        if not self.boot or not self.started or (self.host, self.boot) != (observer.host, observer.boot):
            return False
        return _started(self.pid) not in ("", self.started)


def attempt_of(writer: str) -> int:
    """Return the number of the attempt that a writer belongs to."""
    number = writer.partition("-")[0]
    return int(number) if number.isdigit() else -1


def _boot() -> str:
    """Return the ids of this boot and of the namespace of process numbers; empty where there are none."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Return when a process started; None if it has ended, empty where that cannot be told."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if _has_ended(pid) else ""
    # The name of the program, in parentheses, may hold blanks.
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]


def _has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        # Another user's, of which /proc may show nothing.
        return False
    return False


def _slurm_task(environment: Mapping[str, str]) -> str:
    job = environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID")
    if not job:
        return ""
    return "_".join([job, environment.get("SLURM_ARRAY_TASK_ID", ""), environment.get("SLURM_PROCID", "")])


class Heartbeat:
    """Shows the other workers that this one is alive, by changing its file."""

    def __init__(self, files: FileSystem, paths: RunPaths, worker: Worker) -> None:
        self._files = files
        self._paths = paths
        self.worker = worker
        self._path = paths.heartbeat(worker.writer)
        self._beats = 0
        self._load: dict[str, Any] = {}

    def publish(self, load: dict[str, Any]) -> None:
        """Let the next beat say what the others may know of this worker's work."""
        self._load = load

    def beat(self) -> None:
        """Change the file. Nothing is flushed: a heartbeat that a crash loses was none."""
        self._beats += 1
        values = {**asdict(self.worker), "beat": self._beats, "load": self._load}
        put_unflushed(self._files, self._paths, self._path, seal(values), self.worker.writer)

    def close(self) -> None:
        """Say that the worker has ended."""
        self._files.remove(self._path)


@dataclass(slots=True)
class _Seen:
    content: bytes | None
    since: float
    """When this content was first seen, on the observer's clock."""
    changed: bool = False
    """Whether it has changed under the observer's eyes."""


class Workers:
    """Tells which workers are alive.

    Clocks of machines differ, and those of file systems as well, so none is read: a worker is dead once its heartbeat
    has not changed for ``lease_seconds`` on the monotonic clock of this process.
    """

    def __init__(
        self,
        files: FileSystem,
        paths: RunPaths,
        me: Worker,
        lease_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = files
        self._paths = paths
        self.me = me
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    def alive(self, writer: str) -> bool:
        """Look at a worker's heartbeat and return whether it may still be alive."""
        if writer == self.me.writer:
            return True
        content = self._content(writer)
        now = self._clock()
        seen = self._seen.get(writer)
        if seen is None or seen.content != content:
            seen = self._seen[writer] = _Seen(content, now, changed=seen is not None and content is not None)
        worker = self._worker(content)
        if worker is not None and worker.is_gone(self.me):
            return False
        return now - seen.since < self._lease_seconds

    def working(self, writer: str) -> bool:
        """Return whether a worker may still be alive and has not said that it has ended."""
        return self.alive(writer) and (writer == self.me.writer or self._seen[writer].content is not None)

    def surely_alive(self, writer: str) -> bool:
        """Return whether a worker's heartbeat has changed since this one first looked, and it is not dead since."""
        return self.alive(writer) and (writer == self.me.writer or self._seen[writer].changed)

    def load(self, writer: str) -> dict[str, Any]:
        """Return what a worker last said of its work; empty if nothing is known."""
        values = _unsealed(self._content(writer))
        load = values.get("load")
        return load if isinstance(load, dict) else {}

    def names(self) -> list[str]:
        """Return the writers that have a heartbeat, dead ones among them."""
        names = names_in(self._files, self._paths.workers)
        return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))

    def _content(self, writer: str) -> bytes | None:
        try:
            return self._files.read(self._paths.heartbeat(writer))
        except FileNotFoundError:
            return None

    def _worker(self, content: bytes | None) -> Worker | None:
        values = _unsealed(content)
        try:
            return Worker(**{field.name: values[field.name] for field in fields(Worker)})
        except (KeyError, TypeError):
            return None


def _unsealed(content: bytes | None) -> dict[str, Any]:
    """Return a heartbeat's values; none where it is damaged, which is a change like any other."""
    try:
        return {} if content is None else unseal(content)
    except ValueError:
        return {}


def announce(files: FileSystem, paths: RunPaths, worker: Worker) -> Path:
    """Write the file that a worker's claims are names of, and return its path."""
    path = paths.workers / f"{worker.writer}.claim"
    write_new(files, path, contents(f"{worker.writer}\n".encode()))
    return path
