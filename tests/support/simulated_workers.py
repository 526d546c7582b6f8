"""Processes that take turns on simulated machines, in an order that one seed decides.

What each process does runs in a thread of its own, of which one runs at a time: at every operation on files it may have
to wait for its next turn. In between others run, time passes, and processes stall, die, or lose their power. Their
clocks start anywhere and go at different rates.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rollout.run_dir.workers import BEATS_PER_LEASE, Heartbeat
from tests.support.simulated_disk import SimulatedDisk
from tests.support.simulated_files import ProcessDied, SimulatedFiles

T = TypeVar("T")

_MOST_TURNS = 3_000_000


@dataclass(frozen=True)
class Conditions:
    """What the processes of a schedule have to bear."""

    delay: float = 0.0
    """Seconds within which a machine sees what another has done."""
    operation_seconds: float = 0.01
    """Longest time that an operation on files takes."""
    switches: float = 0.3
    """Share of operations after which another process may run."""
    stalls: float = 0.0
    """Share of turns before which a process stalls."""
    stall_seconds: float = 0.0
    """Longest stall."""
    faults: int = 0
    """Kills and power cuts, all in all."""
    fault_share: float = 0.0
    """Share of turns before which one happens, until they are used up."""
    clock_rates: float = 0.0
    """How far rates of clocks are from 1, at most."""


class Schedule:
    """Lets processes take turns until all have ended."""

    def __init__(self, rng: random.Random, conditions: Conditions) -> None:
        self.rng = rng
        self.conditions = conditions
        self.disk = SimulatedDisk(rng, conditions.delay)
        self.faults: list[str] = []
        """The kills and power cuts so far."""
        self.stalls = 0
        self.turns = 0
        self.tasks: list[_Task] = []
        self.current: _Task | None = None
        self.turn_ended = threading.Semaphore(0)
        self._processes: list[Process] = []

    @property
    def alive(self) -> list[Process]:
        return [process for process in self._processes if process.files.alive]

    def start(self, machine: str, main: Callable[[Process], None]) -> Process:
        """Start a process; what ``main`` raises, but for the process's death, is raised in `run`."""
        process = Process(self, machine)
        self._processes.append(process)
        process.spawn(lambda: main(process), ends_process=True)
        return process

    def run(self, on_end: Callable[[], None]) -> None:
        """Give turns until no process is left.

        Args:
            on_end: called after each end of a process; may start others.
        """
        try:
            for _ in range(_MOST_TURNS):
                if not self.tasks:
                    return
                self._turn(on_end)
            raise AssertionError(f"the processes have not ended in {_MOST_TURNS} turns")
        finally:
            # No thread is left behind.
            for task in self.tasks:
                task.process.files.kill()
                while not task.ended:
                    task.resume()

    def _turn(self, on_end: Callable[[], None]) -> None:
        conditions, rng = self.conditions, self.rng
        if len(self.faults) < conditions.faults and rng.random() < conditions.fault_share:
            self._disturb()
        ready = [task for task in self.tasks if task.ready()]
        if not ready:
            self.disk.now = max(self.disk.now, min(task.ready_at() for task in self.tasks))
            return
        task = rng.choice(ready)
        if task.process.files.alive and rng.random() < conditions.stalls:
            self.stalls += 1
            task.process.stalled_until = self.disk.now + rng.random() * conditions.stall_seconds
            return
        self.turns += 1
        task.resume()
        if task.ended:
            self.tasks.remove(task)
            if task.error is not None:
                raise task.error
            if task.ends_process:
                task.process.files.kill()
                on_end()

    def _disturb(self) -> None:
        process = self.rng.choice(self.alive) if self.alive else None
        if process is None:
            return
        kind = self.rng.choice(("kill", "kill", "kill", "machine", "power"))
        self.faults.append(kind)
        if kind == "kill":
            process.files.kill()
        else:
            self.disk.power_cut(process.machine if kind == "machine" else None)


class Process:
    """A simulated process: its files, its clock and its threads."""

    def __init__(self, schedule: Schedule, machine: str) -> None:
        self.machine = machine
        self.schedule = schedule
        self.files: SimulatedFiles = schedule.disk.process(machine, self._operation)
        self.stalled_until = 0.0
        self._clock_start = schedule.rng.uniform(0, 1e6)
        self._clock_rate = 1 + schedule.rng.uniform(-1, 1) * schedule.conditions.clock_rates

    def clock(self) -> float:
        """Return the process's monotonic time, in seconds."""
        return self._clock_start + self._clock_rate * self.schedule.disk.now

    def sleep(self, seconds: float) -> None:
        """Let others run for some seconds of the process's clock."""
        self._task().pause(self.schedule.disk.now + seconds / self._clock_rate)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Let others run until something has happened."""
        while not condition():
            self._task().pause(condition=condition)

    def spawn(self, body: Callable[[], None], ends_process: bool = False) -> None:
        """Run something beside what the process does."""
        self.schedule.tasks.append(_Task(self, body, ends_process))

    def beat(self, heartbeat: Heartbeat, lease_seconds: float) -> None:
        """Begin a heartbeat as `rollout.job.heartbeat_thread` does."""

        def beat_on() -> None:
            while True:
                self.sleep(lease_seconds / BEATS_PER_LEASE)
                with suppress(OSError):
                    heartbeat.beat()

        heartbeat.beat()
        self.spawn(beat_on)

    def _operation(self, name: str) -> None:
        schedule = self.schedule
        task = schedule.current
        if task is None or threading.get_ident() != task.thread.ident:
            # A thread that reads ahead; the process waits for it.
            return
        schedule.disk.now += schedule.rng.random() * schedule.conditions.operation_seconds
        if schedule.rng.random() < schedule.conditions.switches:
            task.pause(schedule.disk.now)

    def _task(self) -> _Task:
        assert self.schedule.current is not None
        return self.schedule.current


class _Task:
    """What one thread of a process does; it runs between `resume` and `pause`."""

    def __init__(self, process: Process, body: Callable[[], None], ends_process: bool) -> None:
        self.process = process
        self.ends_process = ends_process
        self.wake = 0.0
        self.condition: Callable[[], bool] | None = None
        """What it waits for, if not for a time."""
        self.ended = False
        self.error: Exception | None = None
        self._body = body
        self._may_run = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self._started = False

    def ready(self) -> bool:
        """Return whether it can go on; what has died can, to its end."""
        return not self.process.files.alive or self.ready_at() <= self.process.schedule.disk.now

    def ready_at(self) -> float:
        """Return when it can go on, for all that is known now."""
        wake = self.wake
        if self.condition is not None:
            wake = 0.0 if self.condition() else math.inf
        return max(wake, self.process.stalled_until)

    def resume(self) -> None:
        schedule = self.process.schedule
        schedule.current = self
        if self._started:
            self._may_run.release()
        else:
            self._started = True
            self.thread.start()
        schedule.turn_ended.acquire()
        schedule.current = None

    def pause(self, wake: float = 0.0, condition: Callable[[], bool] | None = None) -> None:
        """Let others run.

        Raises:
            ProcessDied: the process died meanwhile.
        """
        self.wake, self.condition = wake, condition
        if self.process.files.alive:
            self.process.schedule.turn_ended.release()
            self._may_run.acquire()
        if not self.process.files.alive:
            raise ProcessDied

    def _run(self) -> None:
        try:
            if self.process.files.alive:
                self._body()
        except ProcessDied:
            pass
        except Exception as error:  # noqa: BLE001 - raised again by the schedule
            self.error = error
        finally:
            self.ended = True
            self.process.schedule.turn_ended.release()


@dataclass
class Beside(Executor):
    """Runs what is submitted beside the process's other work, one after another."""

    process: Process
    _last: Future[Any] | None = field(default=None)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        before, future = self._last, _Waited[T](self.process)
        self._last = future

        def run() -> None:
            if before is not None:
                self.process.wait(before.done)
            try:
                result = fn(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - raised again by the future
                future.set_exception(error)
            else:
                future.set_result(result)

        self.process.spawn(run)
        return future


class _Waited(Future[T]):
    """A future whose result the schedule waits for."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def result(self, timeout: float | None = None) -> T:
        self._process.wait(self.done)
        return super().result(timeout)
