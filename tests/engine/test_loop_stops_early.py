"""A loop that ends prompts, or the whole call, early: what it aborts, and that a later call goes on token for token."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import rollout.engine
from rollout.engine.batch_row import BatchRow, Group
from rollout.engine.detokenizer import Ids
from rollout.engine.early_stop import EarlyStop
from rollout.engine.tp_sync import SingleProcess
from rollout.records import Record
from rollout.requests import PromptKey, Request
from rollout.sampling_params import SamplingParams
from rollout.stats import Tally
from rollout.stop_conditions import CallProgress, StopConditions, Unfinished, UnfinishedSample
from tests.support.interruptions import interruptible
from tests.support.toy_loop import BROKEN, Fixed, Letters, Wild, World, all_expected, assert_same, expected, many, plain

pytestmark = pytest.mark.usefixtures("late_or_not")


def after_steps(steps: int) -> StopConditions:
    return StopConditions(of_call=(lambda progress: progress.steps >= steps,))


def aborted(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record.finish_reason == "abort"]


def resuming(requests: Sequence[Request], records: Iterable[Record]) -> list[Request]:
    """Requests for the aborted samples alone."""
    by_prompt: dict[PromptKey, dict[int, Record]] = {}
    for record in aborted(records):
        by_prompt.setdefault(PromptKey(record.seed, record.row_id), {})[record.sample] = record
    return [
        replace(request, samples=sorted(by_prompt[request.key]), resumed=by_prompt[request.key])
        for request in requests
        if request.key in by_prompt
    ]


def assert_prefixes(records: Sequence[Record], requests: Sequence[Request]) -> None:
    """Every sample has one record; aborted ones have the first tokens of what they would have become."""
    by_key = {request.key: request for request in requests}
    keys = [(record.row_id, record.sample) for record in records]
    assert sorted(keys) == sorted((request.row_id, i) for request in requests for i in request.wanted_samples)
    for record in records:
        whole = expected(by_key[PromptKey(record.seed, record.row_id)], record.sample)
        tokens = len(record.completion_ids)
        if record.finish_reason == "abort":
            assert record.completion_ids == whole.completion_ids[:tokens]
            assert tokens < len(whole.completion_ids)
            assert whole.text.startswith(record.text)
            assert record.logprobs == pytest.approx(whole.logprobs[:tokens], abs=1e-5)
        else:
            assert (record.completion_ids, record.finish_reason) == (whole.completion_ids, whole.finish_reason)


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 15])
def test_call_that_ends_early_goes_on_token_for_token(steps: int) -> None:
    requests = many(12, seed=4)
    world = World(requests, Wild(steps), pages=40, stop=after_steps(steps))
    records = world.run()
    assert_prefixes(records, requests)
    assert world.tally.aborted_samples == len(aborted(records)) > 0
    finished = [record for record in records if record.finished]
    rest = World(resuming(requests, records), Wild(1), pages=40)
    later = rest.run()
    assert_same([*finished, *later], all_expected(requests))
    assert world.tally.output_tokens + rest.tally.output_tokens == sum(len(r.completion_ids) for r in finished + later)
    if not World.late:  # what resumed samples had is not drawn again
        assert rest.tally.sampled_tokens == rest.tally.output_tokens


def test_samples_are_resumed_as_often_as_needed() -> None:
    requests = many(9, seed=8)
    records, calls, left = [], count(), requests
    while left:
        assert next(calls) < 40
        found = World(left, Fixed(rows=5), stop=after_steps(4)).run()
        records += [record for record in found if record.finished]
        left = resuming(left, found)
    assert next(calls) > 3
    assert_same(records, all_expected(requests))


def test_samples_before_the_first_step_are_aborted_without_tokens() -> None:
    requests = plain(30, n=2)
    world = World(requests, stop=after_steps(0))
    records = world.run()
    assert len(records) == 60
    assert {(record.finish_reason, *record.completion_ids) for record in records} == {("abort",)}
    assert (world.tally.steps, world.tally.output_tokens, world.runner.calls) == (0, 0, 0)


def test_requests_of_a_stream_stay_unread() -> None:
    requests = iter(plain(30))
    records = World(requests, Fixed(rows=2), stop=after_steps(3), reads_all=False, read_first=4).run()
    rest = list(requests)
    assert records[0].row_id == "p0"
    assert {record.row_id for record in records} | {request.row_id for request in rest} == {f"p{i}" for i in range(30)}
    assert len(records) + len(rest) == 30
    assert len(rest) > 20


@pytest.mark.parametrize("policy", [Fixed(rows=64), Fixed(rows=3, prefill_tokens=5), Wild(3)])
def test_enough_samples_of_a_prompt_end_its_others(policy: Fixed | Wild) -> None:
    params = SamplingParams(n=8, max_new_tokens=40)
    requests = [Request(f"r{i}", [i + 3, 5, 9], params, seed=1) for i in range(6)]
    world = World(requests, policy, pages=60, stop=StopConditions(of_prompt=3))
    records = world.run()
    assert_prefixes(records, requests)
    finished = Counter(record.row_id for record in records if record.finished)
    assert all(finished[request.row_id] >= 3 for request in requests)
    assert len(aborted(records)) > 10
    whole = [record for record in records if record.finished] + World(resuming(requests, records)).run()
    assert_same(whole, all_expected(requests))


def test_pages_of_ended_samples_go_to_others() -> None:
    """Without them, the second prompt would have to wait until the last sample of the first has ended."""
    endless = SamplingParams(n=4, max_new_tokens=60, ignore_eos=True)
    first = Request("long", [7, 8, 9], replace(endless, stop_token_ids=(11,)), seed=3)
    lengths = sorted(len(expected(first, i).completion_ids) for i in range(4))
    assert lengths[0] < lengths[-1]
    requests = [first, Request("next", [1, 2, 3], replace(endless, n=1))]
    world = World(requests, Fixed(rows=4), stop=StopConditions(of_prompt=1))
    records = world.run()
    assert len(aborted(records)) == 3
    admitted = next(i for i, report in enumerate(world.reports) if report.waiting_rows == 0)
    assert admitted <= lengths[0] + 2


def test_samples_that_finish_in_the_same_step_are_kept() -> None:
    records = World(plain(1, n=5), stop=StopConditions(of_prompt=2)).run()
    assert [record.finish_reason for record in records] == ["length"] * 5


def test_errors_are_not_finished_samples() -> None:
    """The prompt of broken rows never has enough; the other one has."""
    params = SamplingParams(n=4, max_new_tokens=30)
    requests = [Request("broken", [BROKEN, 3], params), Request("sound", [4, 3], params)]
    records = World(requests, Fixed(rows=2), stop=StopConditions(of_prompt=1)).run()
    reasons = {name: {r.finish_reason for r in records if r.row_id == name} for name in ("broken", "sound")}
    assert reasons["broken"] == {"error"}
    assert "abort" in reasons["sound"]
    assert reasons["sound"] <= {"abort", "stop", "length"}


def test_finished_samples_of_earlier_calls_count() -> None:
    request = replace(plain(1, n=4)[0], samples=(2, 3), finished_before=2)
    records = World([request], stop=StopConditions(of_prompt=2)).run()
    assert [(record.sample, record.finish_reason, record.completion_ids) for record in records] == [
        (2, "abort", []),
        (3, "abort", []),
    ]


def test_progress_counts_what_has_happened() -> None:
    seen: list[CallProgress] = []
    requests = [replace(request, params=SamplingParams(n=2, max_new_tokens=5, ignore_eos=True)) for request in plain(3)]
    records = World(requests, Fixed(rows=2), stop=StopConditions(of_call=(lambda p: bool(seen.append(p)),))).run()
    assert len(records) == 6
    first, last = seen[0], seen[-1]
    assert (first.steps, first.sampled_tokens, first.finished_samples, first.live_rows) == (0, 0, 0, 0)
    assert (last.finished_samples, last.finished_prompts) == (4, 2)
    assert last.steps > 10
    assert all(a.seconds <= b.seconds for a, b in pairwise(seen))
    assert {progress.live_rows for progress in seen} >= {0, 2}


def test_call_that_has_ended_asks_no_condition_again() -> None:
    calls = []
    records = World(plain(300), stop=StopConditions(of_call=(lambda p: bool(calls.append(p) or p.steps >= 2),))).run()
    assert len(records) == 300
    assert calls[-1].steps == 2
    assert [progress.steps for progress in calls].count(2) == 1


class Withdrawals:
    """Names random samples between steps, each as often as it is asked for; all of them may be named, or none."""

    def __init__(self, requests: Sequence[Request], seed: int, share: float) -> None:
        self.random = random.Random(seed)
        self.samples = [(request.row_id, sample) for request in requests for sample in request.wanted_samples]
        self.named: set[tuple[str, int]] = set()
        self.share = share

    def __call__(self, unfinished: Unfinished) -> list[tuple[str, int]]:
        if self.random.random() > self.share:
            return []
        chosen = self.random.choices(self.samples, k=self.random.randint(1, 4))
        self.named.update(chosen)
        return [*chosen, ("of another job", 0)]


@pytest.mark.parametrize("policy", [Fixed(rows=64), Fixed(rows=3, prefill_tokens=5), Wild(5)])
@pytest.mark.parametrize("seed", range(4))
def test_samples_withdrawn_at_any_step_go_on_token_for_token(seed: int, policy: Fixed | Wild) -> None:
    """Their companions, also those with the same prompt, go on as if nothing had happened."""
    requests = many(14, seed)
    left, records, withdrawn = list(requests), [], 0
    while left:
        named = Withdrawals(left, seed + withdrawn, share=0.15)
        found = World(left, policy, pages=30, stop=StopConditions(withdrawn=named), read_first=100).run()
        assert_prefixes(found, left)
        ended = aborted(found)
        assert {(record.row_id, record.sample) for record in ended} <= named.named
        withdrawn += len(ended)
        records += [record for record in found if record.finished]
        left = resuming(left, found)
    assert withdrawn > 3
    assert_same(records, all_expected(requests))


def test_samples_are_withdrawn_wherever_they_are() -> None:
    """One decodes, one is in a prefill with another sample, one waits; the others get their pages at once."""
    requests = [*plain(1, n=2), *plain(3, tokens=20, n=2)[1:]]
    steps: list[set[tuple[str, int]]] = [set(), set(), {("p0", 1), ("p1", 1), ("p2", 0)}]
    world = World(
        requests,
        Fixed(rows=4, prefill_tokens=6),
        read_first=100,
        stop=StopConditions(withdrawn=lambda _: steps.pop(0) if steps else ()),
    )
    stream = world.stream()
    records = [next(stream) for _ in range(3)]
    assert {(r.row_id, r.sample): bool(r.completion_ids) for r in records} == {
        ("p0", 1): True,
        ("p1", 1): False,
        ("p2", 0): False,
    }
    assert world.loop._scheduler.alive == 2
    assert world.pool.used_pages <= 2 + 6
    records += stream
    assert_prefixes(records, requests)
    assert len(aborted(records)) == 3


def test_samples_unknown_to_the_call_are_passed_over() -> None:
    requests = plain(3)
    conditions = StopConditions(withdrawn=lambda _: {("elsewhere", 0), ("p1", 7)})
    assert_same(World(requests, stop=conditions).run(), all_expected(requests))


def test_unfinished_samples_are_listed_wherever_they_are() -> None:
    """Those of the test above, and a finished one, which is not listed."""
    requests = [*plain(1, n=2), *plain(3, tokens=20, n=2)[1:]]
    lists: list[list[UnfinishedSample]] = []

    def look(unfinished: Unfinished) -> tuple[()]:
        lists.append(unfinished())
        return ()

    records = World(
        requests, Fixed(rows=4, prefill_tokens=6), read_first=100, stop=StopConditions(withdrawn=look)
    ).run()
    assert_same(records, all_expected(requests))
    first, third, last = lists[0], lists[2], lists[-1]
    assert [(s.row_id, s.sample) for s in first] == [(r.row_id, i) for r in requests for i in r.wanted_samples]
    assert not any(s.computed or s.generated_tokens for s in first)
    assert {(s.row_id, s.sample) for s in third if s.computed} == {("p0", 0), ("p0", 1)}
    assert {s.prompt_tokens for s in third if s.row_id == "p1"} == {20}
    ages = {(s.row_id, s.sample): s.generated_tokens for s in third}
    assert ages["p0", 0] > 0 == ages["p2", 0]
    assert len(last) < len(first)


def test_stream_may_have_no_request_for_a_time() -> None:
    """The call goes on with what it has, and reads what comes later, also once nothing is left to compute."""
    early, late, last = plain(3), many(4, seed=3), many(5, seed=5)[4:]
    finished: list[str] = []
    asked = 0

    def stream() -> Iterator[Request | None]:
        nonlocal asked
        yield from early
        while len(finished) < len(early):
            asked += 1
            yield None
        yield from late
        yield None
        while len(finished) < len(early) + sum(len(request.wanted_samples) for request in late):
            yield None
        yield from last

    world = World(stream(), read_first=100)
    records = []
    for record in world.stream():
        finished.append(record.row_id)
        records.append(record)
    assert_same(records, all_expected([*early, *late, *last]))
    assert 1 < asked < world.tally.steps


class SecondRank(SingleProcess):
    """Rank 0 decides otherwise: by its clock, or by chance."""

    def __init__(self, first: bool) -> None:
        self.first = first

    def first_rank_value(self, value: float) -> float:
        return math.inf if self.first else 0.0


@pytest.mark.parametrize("first", [False, True])
def test_ranks_end_a_call_when_rank_0_does(first: bool) -> None:
    stop = EarlyStop(StopConditions(of_call=(lambda progress: not first,)), reads_all=True, sync=SecondRank(first))
    assert stop.look(Tally(), live_rows=0, waiting_rows=0, unfinished=list) is first
    assert stop.call_ends is first


class Follower(SingleProcess):
    """Rank 0 withdraws what this rank does not."""

    def first_rank_value(self, value: float) -> float:
        return 1.0

    def first_rank_samples(self, own: frozenset[tuple[str, int]]) -> frozenset[tuple[str, int]]:
        return frozenset({("r", 1)})


def test_ranks_withdraw_what_rank_0_names() -> None:
    request = Request("r", [3], SamplingParams(n=3))
    rows = [BatchRow(request, sample, Group(0, np.array([3])), limit=9) for sample in range(3)]
    stop = EarlyStop(StopConditions(withdrawn=lambda _: {("r", 2)}), reads_all=True, sync=Follower())
    assert stop.look(Tally(), live_rows=3, waiting_rows=0, unfinished=list)
    assert [row.sample for row in rows if stop.ends(row)] == [1]


class Interruption:
    """Raises KeyboardInterrupt at one line of the engine, as Ctrl-C may."""

    FOLDER = str(Path(rollout.engine.__file__).parent)

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Interruption | None:
        if not frame.f_code.co_filename.startswith(self.FOLDER):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self


def interrupted(world: World) -> list[Record] | None:
    """What there is of a loop that is interrupted; None if it ended before."""
    delivered: list[Record] = []
    try:
        while True:
            world.loop.refill()
            records = world.loop.advance()
            if records is None:
                return None
            delivered += records
    except KeyboardInterrupt:
        sys.settrace(None)
        return [*delivered, *world.loop.abandon()]


def test_interruption_anywhere_loses_and_doubles_no_row() -> None:
    def world(requests: Sequence[Request]) -> World:
        return World(requests, Wild(2), pages=24, read_first=100)

    def interrupted_at(stopped: World, line: int) -> tuple[list[Record] | None, int]:
        interruption = Interruption(line)
        sys.settrace(interruption)
        try:
            return interruptible(lambda: interrupted(stopped)), interruption.lines
        finally:
            sys.settrace(None)

    requests = many(3, seed=3)
    _, lines = interrupted_at(world(requests), 0)
    assert lines > 2000
    for line in range(1, lines, lines // 19):
        stopped = world(requests)
        records, _ = interrupted_at(stopped, line)
        assert records is not None
        assert_prefixes(records, requests)
        stopped.loop.close()
        finished = [record for record in records if record.finished]
        assert_same([*finished, *world(resuming(requests, records)).run()], all_expected(requests))


def test_interruption_while_stop_strings_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows may have got their last token and not have been ended by it yet."""
    params = SamplingParams(n=6, max_new_tokens=12, stop=("ab", "q"), stop_token_ids=(7,))
    requests = [Request(f"r{i}", [i, 5, 9], params, seed=2) for i in range(2)]
    decode, interruptions = Letters.decode, 0
    for at in range(1, 150, 3):
        calls = count()

        def interrupt(self: Letters, ids: Ids, calls: count[int] = calls, at: int = at) -> str:
            if next(calls) == at:
                raise KeyboardInterrupt
            return decode(self, ids)

        monkeypatch.setattr(Letters, "decode", interrupt)
        records = interrupted(World(requests, Fixed(rows=12)))
        monkeypatch.setattr(Letters, "decode", decode)
        if records is not None:
            assert_prefixes(records, requests)
            interruptions += 1
    assert interruptions > 10
