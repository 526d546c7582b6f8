"""Time left: foretold within a quarter from the first tenth of a run on, or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from rollout.batcher.estimators.time_left import TimeLeft
from rollout.batcher.registry import make_policy
from rollout.batcher.simulation.simulator import Machine, simulate
from rollout.batcher.simulation.workloads import Workload, workload_of
from rollout.batcher.types import Bounds, Decision, Observation

CPU = Machine(kv_tokens=10**7, step_ms=(30.0, 2.5, 0.002, 1.2), noise=0.1)
GPU = Machine(kv_tokens=10**7, step_ms=(12.0, 0.03, 0.00005, 0.05), noise=0.1)


class Watched:
    """A policy that also asks for the time left, about 60 times in a run."""

    def __init__(self, max_rows: int, total: int, every_ms: float, idle_share: float = 0.0) -> None:
        self.policy = make_policy("static", Bounds(max_rows=max_rows))
        self.left = TimeLeft()
        self.total = total
        self.every_ms = every_ms
        self.idle_share = idle_share
        self.now_ms = 0.0
        self.foretold: list[tuple[float, float | None]] = []
        self.finished = 0

    def decide(self, observation: Observation) -> Decision:
        decision = self.policy.decide(observation)
        self.now_ms += (1 + self.idle_share) * sum(step.ms for step in observation.steps)
        self.finished += len(observation.finished)
        self.left.observe(observation, decision.rows)
        if self.now_ms >= len(self.foretold) * self.every_ms:
            waiting = self.total - self.finished - observation.live_rows
            self.foretold.append((self.now_ms, self.left.milliseconds(waiting, self.now_ms)))
        return decision

    def errors(self) -> list[float | None]:
        """Relative errors from the first tenth of the run until a twentieth is left; None where nothing is foretold."""
        total = self.now_ms
        due = [(now, left) for now, left in self.foretold if 0.1 * total <= now <= 0.95 * total]
        return [None if left is None else abs(left - (total - now)) / (total - now) for now, left in due]


def watched(workload: Workload, machine: Machine, max_rows: int, idle_share: float = 0.0) -> Watched:
    rough_ms = float(workload.output_tokens.sum()) * (machine.step_ms[0] / max_rows + machine.step_ms[1])
    policy = Watched(max_rows, len(workload), rough_ms / 60, idle_share)
    simulate(workload, machine, policy)
    return policy


def lognormal(rows: int, median: float, sigma: float, limit: int, group: int = 1) -> Workload:
    rng = np.random.default_rng(3)
    lengths = median * np.exp(sigma * rng.standard_normal(rows))
    return workload_of("test", rng.integers(40, 60, rows), lengths, limit, group)


@pytest.mark.parametrize("machine", [CPU, GPU])
@pytest.mark.parametrize(
    ("median", "sigma", "limit"),
    [(60.0, 0.5, 512), (100.0, 0.9, 1024)],
    ids=["narrow", "heavy-tailed"],
)
def test_time_left_of_2000_rows_is_right(machine: Machine, median: float, sigma: float, limit: int) -> None:
    errors = watched(lognormal(2000, median, sigma, limit), machine, max_rows=128).errors()
    known = [error for error in errors if error is not None]
    assert len(known) >= 0.9 * len(errors)
    assert np.median(known) < 0.25


@pytest.mark.parametrize(("median", "limit"), [(100.0, 96), (500.0, 96)], ids=["some cut", "all cut"])
def test_time_left_of_64_prompts_of_4_samples_is_right_once_it_is_known(median: float, limit: int) -> None:
    errors = watched(lognormal(256, median, 0.7, limit, group=4), CPU, max_rows=1024).errors()
    known = [error for error in errors if error is not None]
    assert len(known) >= 0.75 * len(errors)
    assert np.mean(np.array(known) < 0.25) > 0.9


def test_time_between_steps_counts() -> None:
    errors = watched(lognormal(2000, 40.0, 0.5, 256), CPU, max_rows=256, idle_share=1.0).errors()
    assert np.median([error for error in errors if error is not None]) < 0.12


def test_nothing_is_foretold_before_there_is_evidence() -> None:
    # No row has ended, and the limit is far away: lengths may be anything.
    policy = watched(lognormal(256, 400.0, 0.1, 8192), CPU, max_rows=256)
    early = [left for now, left in policy.foretold if now < 0.3 * policy.now_ms]
    assert early
    assert set(early) == {None}
    assert TimeLeft().milliseconds(10, 0.0) is None


def test_time_left_grows_with_the_rows_that_wait() -> None:
    policy = watched(lognormal(600, 40.0, 0.5, 256), CPU, max_rows=64)
    few, many, more = (policy.left.milliseconds(waiting, policy.now_ms) for waiting in (0, 10_000, 20_000))
    assert few is not None
    assert many is not None
    assert more is not None
    assert few < many
    assert more == pytest.approx(2 * many, rel=0.05)
