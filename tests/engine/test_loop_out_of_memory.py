"""The loop without enough memory: records stay the same, and the only live row is given up last."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from rollout.engine import loop as loop_module
from rollout.engine import oom_limits
from rollout.requests import Request, StepReport
from rollout.sampling_params import SamplingParams
from tests.support.toy_loop import (
    PAGE,
    Call,
    Fixed,
    ToyRunner,
    Trouble,
    Wild,
    World,
    all_expected,
    assert_same,
    many,
    plain,
    refuse_at,
    refuse_draws,
)

pytestmark = pytest.mark.usefixtures("late_or_not", "little_patience")


def test_a_passing_squeeze_of_the_only_row_costs_nothing() -> None:
    trouble, raised = refuse_at(set(range(20, 35)))
    requests = plain(40, new=12)
    world = World(requests, Fixed(rows=1), trouble=trouble)
    assert_same(world.run(), all_expected(requests))
    assert len(raised) == 15


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_an_allocator_failure_at_any_call_changes_no_record(error: type[Exception]) -> None:
    requests = many(6, seed=1)
    wanted = all_expected(requests)
    undisturbed = World(requests, Fixed(prefill_tokens=16))
    undisturbed.run()
    failures = 0
    for number in range(1, undisturbed.runner.calls + 1, 2 if error is RuntimeError else 5):
        trouble, raised = refuse_at({number}, error)
        world = World(requests, Fixed(prefill_tokens=16), trouble=trouble)
        assert_same(world.run(), wanted)
        assert world.tally.out_of_memory_events == len(raised)
        failures += len(raised)
    assert failures > undisturbed.runner.calls // 10


@pytest.mark.parametrize("seed", range(4))
def test_many_failures_change_no_record(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    print("seed", seed)
    monkeypatch.setattr(oom_limits, "_CALM_STEPS", 4)
    requests = many(10, seed)
    rng = random.Random(seed)
    trouble, raised = refuse_at({rng.randint(5 * i, 5 * i + 3) for i in range(1, 60)})
    world = World(requests, Wild(seed), trouble=trouble)
    assert_same(world.run(), all_expected(requests))
    assert len(raised) >= 8
    assert world.tally.out_of_memory_events == len(raised)


def refuse_rows(most: int) -> Trouble:
    """Fail like a device whose memory holds the activations of few rows only."""

    def trouble(call: Call) -> None:
        if call.rows > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return trouble


def test_live_rows_settle_at_what_the_device_holds() -> None:
    requests = plain(20, new=12)
    world = World(requests, Fixed(rows=16, prefill_tokens=200), trouble=refuse_rows(3), read_first=20)
    assert_same(world.run(), all_expected(requests))
    assert world.tally.out_of_memory_events == 3  # at 16, 8 and 4 rows
    drawing = [(report.row_target, report.reason) for report in world.reports if report.new_tokens]
    assert drawing[0] == (16, "cap"), "their first tokens came from the prefill"
    assert set(drawing[1:]) == {(2, "oom")}


def test_the_cap_of_a_failure_is_lifted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oom_limits, "_CALM_STEPS", 6)
    requests = plain(40, new=12)
    trouble, raised = refuse_at({4})
    world = World(requests, Fixed(rows=16), trouble=trouble)
    assert_same(world.run(), all_expected(requests))
    assert len(raised) == 1
    targets = [report.row_target for report in world.reports]
    assert min(targets) == 8
    assert targets[-1] == 16
    reasons = {report.reason for report in world.reports if report.row_target == 16}
    assert reasons == {"cap"}


def test_prefills_become_smaller_when_one_alone_is_too_large() -> None:
    def trouble(call: Call) -> None:
        if call.prefill_tokens > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    requests = plain(3, tokens=20)
    world = World(requests, trouble=trouble)
    assert_same(world.run(), all_expected(requests))
    assert max(report.prefill_tokens for report in world.reports) <= 3


def fails_with(token: int) -> Trouble:
    """A row whose prompt begins with this token never fits."""

    def trouble(call: Call) -> None:
        if any(context and context[0] == token for context in call.contexts):
            raise torch.OutOfMemoryError("CUDA out of memory")

    return trouble


def test_a_row_that_fails_even_alone_is_an_error_and_the_job_goes_on() -> None:
    requests = plain(8, new=5)
    world = World(requests, trouble=fails_with(3))
    records = world.run()
    bad = [record for record in records if record.finish_reason == "error"]
    assert [(record.row_id, record.error_class) for record in bad] == [("p3", "too_large")]
    assert "more than 6 tokens does not fit into memory, even alone" in bad[0].error
    assert_same([r for r in records if r not in bad], all_expected(r for r in requests if r.row_id != "p3"))
    assert world.tally.error_samples == 1
    assert world.tally.out_of_memory_events > 1


def test_a_failure_while_sampling_changes_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = many(6, seed=1)
    wanted = all_expected(requests)
    failures = 0
    for number in range(1, 30, 2):
        with monkeypatch.context() as patch:
            raised = refuse_draws(patch, lambda call, rows, number=number: call == number and rows > 1)
            world = World(requests, Fixed(prefill_tokens=16))
            assert_same(world.run(), wanted)
            assert world.tally.out_of_memory_events == len(raised)
            failures += len(raised)
    assert failures > 8


def test_fewer_rows_are_tried_when_sampling_many_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples of a prompt draw their first token at once."""
    requests = plain(2, n=8)
    wanted = all_expected(requests)
    raised = refuse_draws(monkeypatch, lambda _call, rows: rows > 3)
    world = World(requests)
    assert_same(world.run(), wanted)
    assert world.tally.out_of_memory_events == len(raised) > 0


def test_a_row_that_cannot_even_be_sampled_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_draws(monkeypatch, lambda _call, _rows: True)
    records = World(plain(3)).run()
    assert [(record.row_id, record.error_class) for record in records] == [(f"p{i}", "too_large") for i in range(3)]


def test_an_error_that_is_not_about_memory_ends_the_loop() -> None:
    def trouble(call: Call) -> None:
        if call.number == 5:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    world = World(plain(4), trouble=trouble)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        world.run()
    world.loop.close()
    assert world.pool.bytes_held == 0


class Clock:
    """A clock that advances only in ``sleep``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, on_sleep: Callable[[int], None]) -> None:
        self.now, self.sleeps, self.on_sleep = 100.0, 0, on_sleep
        fake = SimpleNamespace(perf_counter=lambda: self.now, monotonic=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(loop_module, "time", fake)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.sleeps += 1
        assert self.sleeps < 5000, "it waits for ever"
        self.on_sleep(self.sleeps)


def test_a_squeezed_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = plain(5)
    world = World(requests)

    def others_leave(sleeps: int) -> None:
        if sleeps == 7:
            world.headroom.taken_bytes = 0

    clock = Clock(monkeypatch, others_leave)
    world.headroom.taken_bytes = 999 * PAGE
    assert_same(world.run(), all_expected(requests))
    assert clock.sleeps == 7
    assert world.tally.error_samples == 0


def test_patience_with_a_squeezed_device_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up one row after the time; the next row gets the same time."""
    monkeypatch.setattr(loop_module, "_PATIENCE_S", 3.0)
    monkeypatch.setattr(loop_module, "_RETRY_S", 0.5)
    requests = plain(4)
    world = World(requests)

    def others_leave(sleeps: int) -> None:
        if sleeps == 14:
            world.headroom.taken_bytes = 0

    clock = Clock(monkeypatch, others_leave)
    world.headroom.taken_bytes = 999 * PAGE
    records = world.run()
    assert [r.row_id for r in records if r.error_class == "too_large"] == ["p0", "p1"]
    assert_same([r for r in records if not r.error_class], all_expected(requests[2:]))
    assert clock.sleeps == 14


def test_a_row_that_never_fits_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, lambda _sleeps: None)
    world = World([Request("large", [1] * 60, SamplingParams())], pages=10)
    assert [record.error_class for record in world.run()] == ["too_large"]
    assert clock.sleeps == 0


@pytest.mark.parametrize("seed", range(3))
def test_pool_follows_the_memory_of_other_processes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    requests = many(14, seed)

    clock = Clock(monkeypatch, lambda _sleeps: None)
    world = World(requests, Fixed(rows=10), pages=100)
    report = world.loop._reporter.on_step
    assert report is not None

    def squeeze(done: StepReport) -> None:
        assert done.kv_bytes == world.held() <= world.headroom.total_bytes - world.headroom.taken_bytes
        report(done)
        if rng.random() < 0.2:
            world.headroom.taken_bytes = rng.choice([0, 60, 80, 90]) * PAGE

    world.loop._reporter.on_step = squeeze
    assert_same(world.run(), all_expected(requests))
    assert world.tally.preempted_rows > 0
    assert clock.sleeps < 5000


class Keeping(ToyRunner):
    """Hold memory until asked for it; the headroom counts it as free."""

    kept = 0

    @property
    def bytes_kept(self) -> int:
        return self.kept

    def shed(self) -> bool:
        had, self.kept = self.kept > 0, 0
        return had


@pytest.mark.parametrize(("taken", "sheds"), [(5, False), (25, True)])
def test_caches_are_dropped_before_rows_are_preempted(taken: int, sheds: bool) -> None:
    """Four rows hold 40 of 100 pages when another process takes some, and 52 at the end."""
    requests = plain(4, tokens=20, new=30)
    world = World(requests, Fixed(rows=4), pages=100)
    runner = Keeping(world.pool, None)
    runner.kept = 40 * PAGE
    world.runner = world.loop._runner = runner

    def squeeze(done: StepReport) -> None:
        if world.tally.steps == 20:
            world.headroom.taken_bytes = taken * PAGE

    world.loop._reporter.on_step = squeeze
    assert_same(world.run(), all_expected(requests))
    assert (runner.kept == 0) == sheds
    assert world.tally.preempted_rows == 0


def test_caches_are_dropped_when_the_allocator_fails() -> None:
    requests = plain(4)
    trouble, _ = refuse_at({5})
    world = World(requests, trouble=trouble)
    runner = Keeping(world.pool, trouble)
    runner.kept = 40 * PAGE
    world.runner = world.loop._runner = runner
    assert_same(world.run(), all_expected(requests))
    assert runner.kept == 0
