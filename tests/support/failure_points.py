"""A small run that is disturbed at one operation on files, and resumed: it must become what it would have been."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.errors import InputError
from tests.support.faulty_files import Fault, FaultyFiles
from tests.support.simulated_disk import SimulatedDisk
from tests.support.simulated_files import ProcessDied
from tests.support.toy_run import Stopped, ToyEngine, ToyJob, ToyWorker, check_output, read_output

STOP_AT = 3
"""Step at which the first attempt is stopped."""


@dataclass(frozen=True)
class Kind:
    """What happens at an operation."""

    name: str
    fault: Fault
    cuts_power: bool = False
    seed: int = 0
    """Decides what a power cut loses."""


KINDS = [
    *(Kind(fault.name, fault) for fault in Fault),
    *(Kind(f"POWER-{seed}", Fault.DIES, cuts_power=True, seed=seed) for seed in range(3)),
]


class Scene:
    """The small run on a disk of its own.

    Args:
        number: of the operation that is disturbed, counted over all attempts; None for none.
    """

    def __init__(self, job: ToyJob, kind: Kind = KINDS[0], number: int | None = None) -> None:
        self.disk = SimulatedDisk(random.Random(kind.seed))
        self.operations: list[str] = []
        self.happened = False
        self._job = job
        self._kind = kind
        self._number = number
        self._attempts = 0

    def attempt(self, stop_at: int | None = None) -> bool:
        """Let a new process work, and return whether it saw the run complete."""
        process = self.disk.process("host")
        number = None if self._number is None or self.happened else self._number - len(self.operations)
        files = FaultyFiles(
            process, number, self._kind.fault, self.disk.power_cut if self._kind.cuts_power else process.kill
        )
        self._attempts += 1
        engine = ToyEngine(step=lambda: self.sleep(1.0), stop_at=stop_at)
        worker = ToyWorker(self._job, files, f"worker{self._attempts}", lambda: self.disk.now, self.sleep, engine)
        try:
            return worker.work()
        except Stopped:
            return False
        except (OSError, InputError, ProcessDied):
            if not files.happened:
                raise
            return False
        finally:
            process.kill()
            self.happened |= files.happened
            self.operations += files.operations

    def sleep(self, seconds: float) -> None:
        self.disk.now += seconds

    def check(self, expected: list[dict[str, Any]]) -> None:
        """Check a run that said to be complete: not even a power cut may change that."""
        self.disk.power_cut()
        check_output(self.disk.process("host"), expected)


def undisturbed(job: ToyJob) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the operations of the small run, and its records."""
    scene = Scene(job)
    assert not scene.attempt(STOP_AT)
    assert scene.attempt()
    whole = Scene(job)
    assert whole.attempt()
    expected = read_output(whole.disk.process("host"))
    scene.check(expected)
    return scene.operations, expected


def disturb(job: ToyJob, kind: Kind, number: int, expected: list[dict[str, Any]]) -> bool:
    """Disturb the small run at an operation, and check what it becomes. Return whether anything happened there."""
    scene = Scene(job, kind, number)
    complete = scene.attempt(STOP_AT)
    if not complete and not scene.happened:
        complete = scene.attempt()
    if complete:
        scene.check(expected)
    # Whether or not the run looked complete, whoever starts it again finds it so.
    assert scene.attempt()
    scene.check(expected)
    return scene.happened


def small_job(folder: Path) -> ToyJob:
    return ToyJob.of(folder, rows=5, rows_per_shard=3, samples=2)
