"""Tokens read one step late change no bit of a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from rollout.batcher.types import Decision, Observation
from rollout.engine import loop as loop_module
from rollout.models.arrays import IntArray
from rollout.records import Record
from rollout.requests import Request, StepReport
from rollout.sampling_params import SamplingParams
from tests.support.toy_loop import (
    BROKEN,
    EOS,
    PAGE,
    PAGE_SIZE,
    Fixed,
    ToyRunner,
    World,
    all_expected,
    assert_same,
    expected,
    many,
    refuse_at,
    refuse_draws,
)

pytestmark = pytest.mark.usefixtures("late_or_not", "little_patience")


def assert_same_bits(records: Sequence[Record], wanted: Sequence[Record]) -> None:
    """Assert that records are equal in any order, including numbers that are not finite."""
    assert sorted(map(repr, records)) == sorted(map(repr, wanted))


def ending(count: int) -> list[Request]:
    """Return requests whose rows end at stop tokens, which no step knows in advance, and some that end by length."""
    kinds = (
        SamplingParams(n=2, max_new_tokens=30),
        SamplingParams(n=2, max_new_tokens=14, stop=("a", "ef", "p"), ignore_eos=True),
        SamplingParams(n=3, max_new_tokens=14, stop_token_ids=(7, 11, 13, 17)),
        SamplingParams(n=1, max_new_tokens=6, ignore_eos=True),
    )
    requests = [Request(f"e{i}", [3 + (5 * i + j) % 20 for j in range(1 + i % 7)], kinds[i % 4]) for i in range(count)]
    requests.insert(2, Request("bad", [BROKEN, 3, 4, 5, 6], SamplingParams(n=2, max_new_tokens=9)))
    return requests


@pytest.mark.parametrize("seed", range(4))
def test_late_tokens_change_no_bit_of_a_record(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    print("seed", seed)
    requests = [*many(8, seed), *ending(6)]
    worlds = []
    for late in (False, True):
        monkeypatch.setattr(World, "late", late)
        worlds.append(World(requests, max_kv_pages=60))
    at_once, late_records = (world.run() for world in worlds)
    assert_same_bits(late_records, at_once)
    stopped = sum(record.finish_reason != "length" for record in at_once)
    wasted = worlds[1].tally.sampled_tokens - worlds[1].tally.output_tokens
    assert worlds[0].tally.sampled_tokens == worlds[0].tally.output_tokens
    assert 0 < wasted <= stopped, "rows that end by length waste none"


class Dip(Fixed):
    """Allow one live row at one decision, and many at all others."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.decisions = at, 0

    def decide(self, observation: Observation) -> Decision:
        self.decisions += 1
        return Decision(1, 64, "dip") if self.decisions == self.at else self.decision


@pytest.mark.parametrize("event", ["preempted", "squeezed", "forward refused", "draw refused", "short of pages"])
def test_row_ending_during_an_event_keeps_its_record(event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the event happen at each step in turn, including one in which a row has ended but its token is unread."""
    requests = ending(5)
    with monkeypatch.context() as patch:
        patch.setattr(World, "late", False)
        undisturbed = World(requests)
        wanted = undisturbed.run()
    assert {record.finish_reason for record in wanted} == {"stop", "length", "error"}
    happened = 0
    for at in range(1, undisturbed.tally.steps + 1):
        with monkeypatch.context() as patch:
            trouble, refused = refuse_at({at} if event == "forward refused" else set())
            world = World(requests, Dip(at if event == "preempted" else 0), pages=60, trouble=trouble)
            if event == "short of pages":
                world = World(requests, pages=60, max_kv_pages=8 + at)
            if event == "draw refused":
                refused = refuse_draws(patch, lambda call, _rows, at=at: call == at)
            if event == "squeezed":
                world.loop._reporter.on_step = squeezing(world, at)
            assert_same_bits(world.run(), wanted)
            happened += len(refused) + world.tally.preempted_rows
    assert happened > undisturbed.tally.steps // 3


def squeezing(world: World, at: int) -> Callable[[StepReport], None]:
    """Take most of the device after one step, and give it back after the next."""

    def on_step(report: StepReport) -> None:
        world.report(report)
        world.headroom.taken_bytes = (world.pages - 5) * PAGE if report.step == at else 0

    return on_step


class Spoiling(ToyRunner):
    """A runner that computes NaN from an end-of-sequence token: a surplus step leaves NaN in a page."""

    def write(self, pages: IntArray, position: int, token: int) -> None:
        super().write(pages, position, token)
        if token == EOS:
            slab, page = divmod(int(pages[position // PAGE_SIZE]), self.pool.slab_pages)
            self.pool.slab(slab).values[0][page, position % PAGE_SIZE] = torch.nan

    def read(self, pages: IntArray, length: int) -> list[int]:
        if length > 1:
            slab, page = divmod(int(pages[(length - 1) // PAGE_SIZE]), self.pool.slab_pages)
            if int(self.pool.slab(slab).keys[0][page, (length - 1) % PAGE_SIZE]) == EOS:
                return [BROKEN]
        return super().read(pages, length)


def test_surplus_step_changes_no_other_row() -> None:
    params = SamplingParams(n=3, max_new_tokens=60)
    requests = [Request(f"s{i}", [3 + (i + j) % 20 for j in range(6)], params) for i in range(12)]
    world = World(requests, max_kv_pages=40)
    world.loop._runner = Spoiling(world.pool, None)  # type: ignore[assignment]
    records = world.run()
    assert_same(records, all_expected(requests))
    assert sum(record.completion_ids[-1] == EOS for record in records) > 20


def test_surplus_step_that_fails_loses_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the step after the only row has ended, while no row waits."""
    monkeypatch.setattr(loop_module, "_PATIENCE_S", 0.0)
    request = Request("only", [5, 4], SamplingParams(max_new_tokens=400))
    wanted = expected(request, 0)
    assert wanted.finish_reason == "stop"
    trouble, raised = refuse_at({len(wanted.completion_ids) + 1})
    world = World([request], trouble=trouble)
    assert_same(world.run(), [wanted])
    assert len(raised) == world.late


def test_nothing_is_left_of_an_outstanding_step_when_the_loop_is_closed() -> None:
    world = World(ending(8))
    next(world.stream())
    world.loop.close()
    world.check()
    assert (world.pool.bytes_held, world.pool.used_pages) == (0, 0)
