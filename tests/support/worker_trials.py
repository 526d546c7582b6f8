"""Workers of a small run under the conditions and in the order that one seed decides."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rollout.run_dir.claims import Place
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import read_run
from tests.support.simulated_disk import SimulatedDisk
from tests.support.simulated_workers import Beside, Conditions, Process, Schedule
from tests.support.toy_run import OUT, Stopped, ToyEngine, ToyJob, ToyWorker, check_output, read_output

LEASE_SECONDS = 120.0
Size = tuple[int, int, int]
SIZES: tuple[Size, ...] = ((1, 1, 1), (4, 1, 2), (5, 2, 2), (9, 2, 1), (10, 4, 3), (12, 1, 1))
"""Rows, rows per shard and samples of the runs that are tried."""
LARGE: Size = (1000, 1, 1)
LARGE_EVERY = 2500
"""One schedule in so many is of a large run."""
_LEAST_ROWS = 2
"""The toy job's second row is one that cannot be encoded."""


@dataclass(frozen=True)
class ToyRun:
    """A run, and what an undisturbed one writes."""

    job: ToyJob
    records: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path, size: Size) -> ToyRun:
        rows, rows_per_shard, samples = size
        job = ToyJob.of(folder, max(rows, _LEAST_ROWS), rows_per_shard, samples)
        disk = SimulatedDisk(random.Random(0))
        assert ToyWorker(job, disk.process(), "alone", lambda: disk.now, lambda seconds: None).work()
        return cls(job, read_output(disk.process()))


@dataclass
class Trial:
    """One schedule."""

    seed: int
    conditions: Conditions = field(init=False)
    starts: int = 0
    stops: int = 0
    """Workers that were stopped and returned what was under way."""
    unlucky: int = 0
    """Workers that lost their files to others who tidied up the complete run."""
    seen_complete: int = 0
    """Workers that have seen the run complete."""

    def __post_init__(self) -> None:
        self.rng = rng = random.Random(self.seed)
        large = self.seed % LARGE_EVERY == LARGE_EVERY - 1
        self.size = LARGE if large else rng.choice(SIZES)
        self.run = toy_run(self.size)
        self.workers = rng.randint(1, 6)
        self.conditions = Conditions(
            delay=rng.choice((0.0, 1.0, 30.0, 60.0)),
            operation_seconds=rng.choice((0.001, 0.01, 0.3)),
            switches=rng.choice((0.1, 0.3, 0.7)),
            stalls=rng.choice((0.0, 0.001, 0.01, 0.03)),
            stall_seconds=rng.choice((1.0, 1.0, 3.0)) * LEASE_SECONDS,
            faults=rng.choice((0, 1, 3, 6)),
            fault_share=rng.choice((0.001, 0.01)),
            clock_rates=rng.choice((0.0, 0.0, 0.05)),
        )
        self.most_stops = rng.choice((0, 0, 3))
        self.schedule = Schedule(rng, self.conditions)

    def __str__(self) -> str:
        return f"seed {self.seed}: size {self.size}, {self.workers} workers, {self.conditions}, {self.schedule.faults}"

    def counts(self) -> Counter[str]:
        """Return what happened, in numbers."""
        counts = Counter(self.schedule.faults)
        counts += Counter(starts=self.starts, stops=self.stops, unlucky=self.unlucky, stalls=self.schedule.stalls)
        return counts + Counter(turns=self.schedule.turns)

    def go(self) -> None:
        """Run the schedule, and check what is on disk whenever a worker takes the run for complete."""
        for number in range(self.workers):
            self._start(number)
        self.schedule.run(self._restart)
        assert self.seen_complete
        self._check()

    def _start(self, number: int) -> None:
        self.starts += 1
        name = f"worker{self.starts}"
        step_seconds = self.rng.choice((1.0, 10.0, 60.0))
        stop_at = self.rng.randrange(8) if self.stops < self.most_stops and self.rng.random() < 0.5 else None

        def main(process: Process) -> None:
            process.sleep(self.rng.random() * LEASE_SECONDS)
            worker = ToyWorker(
                self.run.job,
                process.files,
                name,
                process.clock,
                process.sleep,
                engine=ToyEngine(step=lambda: process.sleep(step_seconds), stop_at=stop_at),
                executor=Beside(process),
                lease_seconds=LEASE_SECONDS,
                place=Place(number % self.workers, self.workers),
                beating=lambda heartbeat: process.beat(heartbeat, LEASE_SECONDS),
            )
            try:
                complete = worker.work()
            except Stopped:
                self.stops += 1
            except FileNotFoundError:
                # A worker that starts while the last one tidies up asks to be started again, with status 75.
                assert self._complete()
                self.unlucky += 1
            else:
                if complete:
                    self.seen_complete += 1
                    self._check()

        self.schedule.start(f"machine{number % self.rng.randint(1, self.workers)}", main)

    def _restart(self) -> None:
        """Start a worker in place of one that died, or of all if they left the run incomplete."""
        interrupted = len(self.schedule.faults) + self.stops + self.unlucky
        abandoned = not self.schedule.alive and not self.seen_complete
        if self.starts < self.workers + interrupted or abandoned:
            self._start(self.starts)

    def _complete(self) -> bool:
        with self.schedule.disk.seen_at_once() as files:
            return read_run(RunPaths(OUT), files).complete()

    def _check(self) -> None:
        with self.schedule.disk.seen_at_once() as files:
            check_output(files, self.run.records)


@cache
def toy_run(size: Size) -> ToyRun:
    """Return the run of a size."""
    with tempfile.TemporaryDirectory() as folder:
        return ToyRun.of(Path(folder), size)
