"""Measure how long jobs take whose workers differ in speed: with static shards, stealing shards, and migrating samples.

The product's claims, part files, handovers and commits run on a simulated file system and a simulated clock; only the
engine is a toy, which decodes a batch of rows, each step taking a time for itself and for each row. Lengths are
lognormal, as those of chats are.

    python -m jobs.bench.stragglers [--slow 4] [--workers 4] [--rows 512]
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rollout.requests import Request
from rollout.run_dir.claims import Place
from tests.support.simulated_workers import Beside, Conditions, Process, Schedule
from tests.support.timed_engine import Lengths, TimedEngine
from tests.support.toy_run import ToyJob, ToyWorker, read_output

LEASE_SECONDS = 120.0


@dataclass(frozen=True)
class Setting:
    """What is measured: workers, of which the first is slow, and their work."""

    workers: int
    slow: float
    rows: int
    samples: int
    rows_per_shard: int
    sigma: float

    @property
    def lengths(self) -> Lengths:
        return Lengths(sigma=self.sigma)

    def slowness(self, worker: int) -> float:
        """Return how many times as long as the others a worker takes."""
        return 1.0 if worker else self.slow


def static_seconds(setting: Setting, job: ToyJob) -> float:
    """Return the time of the slowest worker if each generates its part of the rows."""
    times = []
    rows = list(job.prompts.rows(0, len(job.prompts)))
    for worker in range(setting.workers):
        slept: list[float] = []
        part = rows[worker * len(rows) // setting.workers : (worker + 1) * len(rows) // setting.workers]
        params = job.config.sampling.params()
        requests = [
            Request(row.row_id, job.encode(row.prompt).token_ids, params)
            for row in part
            if row.prompt is not None and row.prompt != job.bad
        ]
        engine = TimedEngine(slept.append, setting.lengths, slowness=setting.slowness(worker))
        for _ in engine.run(requests):
            pass
        times.append(sum(slept))
    return max(times)


def shared_seconds(setting: Setting, job: ToyJob, *, migrate: bool, seed: int) -> tuple[float, int]:
    """Return the time of a job on shared shards, and how many samples under way were handed over."""
    schedule = Schedule(random.Random(seed), Conditions(operation_seconds=0.002))
    engines: list[TimedEngine] = []

    def main(worker: int, process: Process) -> None:
        engine = TimedEngine(process.sleep, setting.lengths, slowness=setting.slowness(worker), shares=migrate)
        engines.append(engine)
        ToyWorker(
            job,
            process.files,
            f"w{worker}",
            process.clock,
            process.sleep,
            engine=engine,
            executor=Beside(process),
            lease_seconds=LEASE_SECONDS,
            place=Place(worker, setting.workers),
            beating=partial(process.beat, lease_seconds=LEASE_SECONDS),
        ).work()

    for worker in range(setting.workers):
        schedule.start(f"machine{worker}", partial(main, worker))
    ends: list[float] = []
    files = schedule.disk.process()
    schedule.run(lambda: ends.append(schedule.disk.now))
    count = len(read_output(files))
    assert count == setting.rows * setting.samples, count
    return max(ends), sum(engine.withdrawn for engine in engines)


def ideal_seconds(setting: Setting, job: ToyJob) -> tuple[float, float]:
    """Return the time if all workers were busy with full batches to the end, and that of the longest sample alone."""
    engine = TimedEngine(lambda _: None)
    costs, rows = engine.costs, engine.rows
    keys = [(row.row_id, s) for row in job.prompts.rows(0, len(job.prompts)) for s in range(setting.samples)]
    lengths = [setting.lengths.of(*key) for key in keys]
    full_step = (costs.step + costs.row * rows) / 1e3
    speed = sum(rows / (full_step * setting.slowness(worker)) for worker in range(setting.workers))
    return sum(lengths) / speed, max(lengths) * (costs.step + costs.row) / 1e3


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--slow", type=float, default=4.0, help="how many times as long the first worker takes")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--rows-per-shard", type=int, default=16)
    parser.add_argument("--sigma", type=float, default=1.0, help="of the lognormal lengths, whose median is 200 tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    seed = options.pop("seed")
    setting = Setting(**options)
    with tempfile.TemporaryDirectory() as folder:
        job = ToyJob.of(Path(folder), setting.rows, setting.rows_per_shard, setting.samples)
        ideal, longest = ideal_seconds(setting, job)
        bound = max(ideal, longest)
        print(f"{setting}, seed {seed}")
        print(f"ideal: {ideal:.1f} s with all busy to the end; the longest sample alone takes {longest:.1f} s")
        static = static_seconds(setting, job)
        stealing, _ = shared_seconds(setting, job, migrate=False, seed=seed)
        migrating, moved = shared_seconds(setting, job, migrate=True, seed=seed)
    print(f"{'':28}{'job s':>8}{'x bound':>9}")
    for name, seconds in (("static shards", static), ("stealing shards", stealing), ("migrating samples", migrating)):
        print(f"{name:28}{seconds:8.1f}{seconds / bound:9.2f}")
    print(f"{moved} samples under way were handed over")


if __name__ == "__main__":
    main()
