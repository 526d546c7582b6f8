"""Workers that differ in speed hand samples over, while some die, and every sample is still written exactly once."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from typing import Any

import pytest

from rollout.errors import InputError
from rollout.job.shard_worker import ShardWorker
from rollout.job.sharing import Sharing
from rollout.run_dir.claims import Place
from rollout.run_dir.handover import Gift
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import read_run
from tests.support.simulated_workers import Beside, Conditions, Process, Schedule
from tests.support.timed_engine import Costs, Lengths, TimedEngine
from tests.support.toy_run import OUT, ToyJob, ToyWorker, check_output, read_output

LEASE_SECONDS = 40.0
LENGTHS = Lengths(median=60, sigma=1.2, most=600)
COSTS = Costs(step=100, row=5, prefill_token=1)


class World:
    """Workers of one run, of which the first is the slowest."""

    def __init__(self, job: ToyJob, seed: int, slowness: list[float], conditions: Conditions, live: int = 4) -> None:
        self.job = job
        self.schedule = Schedule(random.Random(seed), conditions)
        self.slowness = slowness
        self.live = live
        self.engines: list[TimedEngine] = []
        self.ends: list[float] = []
        self.starts = 0
        self.complete = 0

    def start(self) -> None:
        number, self.starts = self.starts, self.starts + 1
        place = number % len(self.slowness)

        def main(process: Process) -> None:
            if number >= len(self.slowness):
                # A machine that has just started sees what the others have done.
                process.sleep(self.schedule.conditions.delay)
            engine = TimedEngine(process.sleep, LENGTHS, COSTS, slowness=self.slowness[place], rows=self.live)
            self.engines.append(engine)
            worker = ToyWorker(
                self.job,
                process.files,
                f"w{number}",
                process.clock,
                process.sleep,
                engine=engine,  # type: ignore[arg-type]
                executor=Beside(process),
                lease_seconds=LEASE_SECONDS,
                place=Place(place, len(self.slowness)),
                beating=partial(process.beat, lease_seconds=LEASE_SECONDS),
            )
            try:
                self.complete += worker.work()
            except FileNotFoundError:
                # It started while the last one tidied up.
                with self.schedule.disk.seen_at_once() as files:
                    assert read_run(RunPaths(OUT), files).complete()
            except InputError as error:
                # It saw the shards of the others before their run.json.
                if "no run.json" not in str(error):
                    raise

        self.schedule.start(f"machine{place}", main)

    def go(self) -> None:
        for _ in self.slowness:
            self.start()
        self.schedule.run(self._ended)

    def _ended(self) -> None:
        self.ends.append(self.schedule.disk.now)
        lost = self.starts < len(self.slowness) + len(self.schedule.faults)
        if lost or (not self.schedule.alive and not self.complete):
            self.start()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> ToyJob:
    return ToyJob.of(tmp_path_factory.mktemp("job"), rows=18, rows_per_shard=6, samples=2)


@pytest.fixture(scope="module")
def undisturbed(job: ToyJob) -> list[dict[str, Any]]:
    world = World(job, 0, [1.0], Conditions())
    world.go()
    with world.schedule.disk.seen_at_once() as files:
        return read_output(files)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many gifts were opened and how many taken back."""
    found: Counter[str] = Counter()
    open_gift, take_back = ShardWorker._open_gift, Sharing._take_back

    def count_gift(worker: ShardWorker, gift: Gift) -> None:
        found["gifts"] += 1
        open_gift(worker, gift)

    def count_back(sharing: Sharing, giving: Any) -> None:
        found["back"] += 1
        take_back(sharing, giving)

    monkeypatch.setattr(ShardWorker, "_open_gift", count_gift)
    monkeypatch.setattr(Sharing, "_take_back", count_back)
    return found


def test_slow_worker_hands_its_samples_to_faster_ones(
    job: ToyJob, undisturbed: list[dict[str, Any]], counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = World(job, 3, [8.0, 1.0, 1.0], Conditions())
    shared.go()
    with shared.schedule.disk.seen_at_once() as files:
        check_output(files, undisturbed)
    assert counts["gifts"]
    assert sum(engine.withdrawn for engine in shared.engines)
    monkeypatch.setattr(TimedEngine, "_named", lambda *_: [])
    alone = World(job, 3, [8.0, 1.0, 1.0], Conditions())
    alone.go()
    with alone.schedule.disk.seen_at_once() as files:
        check_output(files, undisturbed)
    # In simulated seconds, so that nothing depends on this machine.
    assert max(shared.ends) < 0.6 * max(alone.ends)


@pytest.mark.parametrize("start", range(0, 6, 3))
def test_workers_that_die_while_they_share(
    start: int, job: ToyJob, undisturbed: list[dict[str, Any]], counts: Counter[str]
) -> None:
    faults = 0
    for seed in range(start, start + 3):
        rng = random.Random(seed)
        conditions = Conditions(
            delay=rng.choice((0.0, 1.0, 30.0)),
            operation_seconds=rng.choice((0.001, 0.02)),
            stalls=rng.choice((0.0, 0.002)),
            stall_seconds=2 * LEASE_SECONDS,
            faults=rng.choice((0, 1, 3)),
            fault_share=0.002,
        )
        world = World(job, seed, [8.0, *rng.choices((1.0, 2.0, 4.0), k=rng.randint(1, 3))], conditions)
        print(f"seed {seed}: {world.slowness}, {conditions}")
        world.go()
        assert world.complete
        with world.schedule.disk.seen_at_once() as files:
            check_output(files, undisturbed)
        faults += len(world.schedule.faults)
    assert counts["gifts"]
    assert faults
