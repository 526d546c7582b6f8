"""When a job stops: at signals, in time before a deadline, and with the other ranks of its launch."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from rollout.job.stop_signals import StopSignals
from rollout.job.stopping import Stopping
from rollout.job.time_limit import TimeLimit
from rollout.records import Record
from rollout.requests import Request
from rollout.sampling_params import SamplingParams
from rollout.stop_conditions import CallProgress
from tests.support.jobs import record_of, report_of


class World:
    """A job's clock, and what it stops by."""

    def __init__(self, seconds: float | None = None) -> None:
        self.time = 1000.0
        self.slept: list[float] = []
        self.signals = StopSignals({})
        limit = None if seconds is None else TimeLimit(seconds, "job.deadline")
        self.stopping = Stopping(self.signals, limit, clock=lambda: self.time, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.slept.append(seconds)

    def steps(self, count: int, seconds: float) -> bool:
        """Run a call of so many steps; return whether the engine was told to stop."""
        (condition,) = self.stopping.conditions.of_call
        for step in range(count + 1):
            if condition(CallProgress(0.0, step, 0, 0, 0, 0, 0)):
                return True
            self.time += seconds
        return False

    def until_stopped(self, seconds: float) -> float:
        """Run steps until the engine is told to stop, and return the time."""
        assert self.steps(10_000, seconds)
        return self.time


def finished(tokens: int) -> Record:
    record = record_of(Request("r", [1], SamplingParams()), 0)
    return replace(record, completion_ids=[5] * tokens, finish_reason="stop")


def test_job_without_a_limit_goes_on_until_a_signal() -> None:
    world = World()
    assert not world.steps(1000, 60.0)
    assert world.stopping.admits()
    world.signals.received = signal.SIGUSR1
    assert world.steps(1, 1.0)
    assert not world.stopping.admits()
    assert world.stopping.reason == "SIGUSR1"


def test_job_stops_before_its_deadline_by_what_a_stop_takes() -> None:
    assert World(100).until_stopped(0.01) == pytest.approx(1000 + 95, abs=0.1)
    # The engine looks between steps alone: one more could end too late.
    assert 1000 + 100 - 5 - 8 - 4 < World(100).until_stopped(4.0) <= 1000 + 100 - 5 - 4
    world = World(100)
    world.stopping.step(report_of(1, kv_tokens=50_000))
    world.stopping.stored(tokens=1000, seconds=0.2)
    assert world.until_stopped(0.01) == pytest.approx(1000 + 100 - 5 - 20, abs=0.1)
    assert world.stopping.reason == "job.deadline"


def test_step_that_was_slow_once_is_forgotten() -> None:
    """Such as the one that compiled the model's kernels."""
    world = World(10_000)
    world.steps(1, 300.0)
    assert world.stopping.margin > 600
    world.steps(8000, 0.01)
    assert world.stopping.margin < 6


def test_time_between_calls_is_no_step() -> None:
    world = World(10_000)
    world.steps(20, 0.1)
    world.time += 900
    world.steps(20, 0.1)
    assert world.stopping.margin == pytest.approx(5.2)


def test_completions_that_cannot_end_in_time_are_not_begun() -> None:
    """Those under way go on; as long as nothing is known of their lengths, all begin."""
    world = World(100)
    world.steps(200, 0.1)
    assert world.stopping.admits()
    for tokens in (10, 700, 720, 690, 100_000):
        world.stopping.finished(finished(tokens))
    # 700 tokens at 0.1 s each, and about 75 s are left.
    assert world.stopping.admits()
    world.time += 6
    assert not world.stopping.admits()
    assert not world.steps(1, 0.1)
    assert world.stopping.reason == "job.deadline"
    # It stays so, although short ones have ended since.
    for _ in range(1000):
        world.stopping.finished(finished(1))
    assert not world.stopping.admits()
    assert list(world.stopping.admitted(Request(str(i), [1], SamplingParams()) for i in range(3)))[1:] == []


def test_aborted_samples_do_not_count_as_lengths() -> None:
    world = World(100)
    world.steps(10, 1.0)
    world.stopping.finished(replace(finished(10_000), finish_reason="abort"))
    assert world.stopping.admits()


def test_requests_end_where_completions_no_longer_fit() -> None:
    world = World(100)
    world.steps(10, 1.0)
    world.stopping.finished(finished(60))
    read = []
    for request in world.stopping.admitted(Request(str(i), [1], SamplingParams()) for i in range(50)):
        read.append(request.row_id)
        world.time += 3
    assert 5 <= len(read) <= 9


def test_waiting_ends_with_a_signal() -> None:
    looks = []

    def idle() -> None:
        looks.append(world.time)

    world = World()
    world.stopping.wait(3.0, idle)
    assert sum(world.slept) == pytest.approx(3.0)
    assert max(world.slept) <= 0.1
    assert len(looks) == len(world.slept)
    world.signals.received = signal.SIGTERM
    world.stopping.wait(3.0, idle)
    assert sum(world.slept) == pytest.approx(3.0)


class Launch:
    """What the ranks of a launch say to each other."""

    def __init__(self) -> None:
        self.said: str | None = None
        self.asked = 0

    def announce_stop(self, reason: str) -> None:
        self.said = reason

    def announced_stop(self) -> str | None:
        self.asked += 1
        return self.said


def test_ranks_of_a_launch_stop_together() -> None:
    launch, first, second = Launch(), World(), World()
    first.stopping.join(launch)
    second.stopping.join(launch)
    assert not first.steps(100, 0.1)
    assert launch.asked <= 11, "they are asked once a second"
    second.signals.received = signal.SIGTERM
    assert second.steps(1, 0.1)
    assert launch.said == "SIGTERM"
    first.time += 1
    assert first.steps(1, 0.1)
    assert first.stopping.reason == "SIGTERM"
