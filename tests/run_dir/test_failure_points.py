"""Whatever operation on files fails, and wherever a run is killed or loses its power, it resumes and is complete.

A small run that is stopped once and resumed is disturbed at one operation; then a new process resumes it, and every
column of every record must be as in an undisturbed run. Here a part of all operations is tried, which the kind of fault
chooses; ``make faults`` tries all.
"""

from __future__ import annotations

import random

import pytest

from tests.support.failure_points import KINDS, Kind, Scene, disturb, small_job, undisturbed
from tests.support.faulty_files import Fault
from tests.support.toy_run import OUT, ToyJob

SHARE = 6
"""One in so many operations is tried."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> ToyJob:
    return small_job(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_run_survives_a_fault_at_any_operation(job: ToyJob, kind: Kind) -> None:
    operations, expected = undisturbed(job)
    first = random.Random(f"{kind.name}").randrange(SHARE)
    happened = 0
    for number in range(1 + first, len(operations) + 1, SHARE):
        print(f"{kind.name} at operation {number}, {operations[number - 1]}")
        happened += disturb(job, kind, number, expected)
    assert happened > len(operations) / SHARE / 2


def test_complete_run_survives_a_power_cut(job: ToyJob) -> None:
    _, expected = undisturbed(job)
    for seed in range(20):
        print(f"seed {seed}")
        scene = Scene(job, Kind("", Fault.EIO, seed=seed))
        assert scene.attempt()
        scene.check(expected)
        # What is left of its work folder goes at the next start.
        assert scene.attempt()
        assert not scene.disk.process("host").exists(OUT / "work")
