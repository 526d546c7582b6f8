"""The loop against one row at a time: whatever memory, policy and allocator do, the same records come out.

The model is a toy whose logits depend on the whole context, which it reads back from the pages; so a page that is
lost, mixed up or overwritten changes what is generated.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from rollout.batcher.types import Decision, Observation, Policy
from rollout.engine import loop as loop_module
from rollout.engine.batch_row import noise_key
from rollout.engine.detokenizer import Ids, Text
from rollout.engine.kv_memory import Memory
from rollout.engine.loop import Loop
from rollout.engine.waiting_queue import Queue
from rollout.headroom.fake import FakeHeadroom
from rollout.models.arrays import IntArray
from rollout.models.forward_batch import Packed
from rollout.models.kv_cache.layout import KVLayout, Site, Span
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.runners.base import Runner
from rollout.models.sampling.sampler import RowSampling, Sampled, sample
from rollout.records import FinishReason, Record
from rollout.requests import Request, StepReport
from rollout.sampling_params import SamplingParams
from rollout.stats import Tally

PAGE_SIZE, VOCABULARY, EOS, BROKEN = 4, 30, 2, 29
LAYOUT = KVLayout((Site(nn.Identity(), 1, 1, 1, Span()),), torch.float32, PAGE_SIZE)
PAGE = LAYOUT.bytes_per_page
CPU = torch.device("cpu")
_TABLE = torch.from_numpy(np.random.default_rng(0).standard_normal((64, VOCABULARY))).float()
_TABLE[:, BROKEN] = -30.0  # for prompts alone


def logits_of(context: Sequence[int]) -> torch.Tensor:
    """[V]: depends on every token and its place; NaN when the context begins with `BROKEN`."""
    if context[0] == BROKEN:
        return torch.full((VOCABULARY,), torch.nan)
    state = 7
    for token in context:
        state = (state * 31 + token + 1) % 9973
    return _TABLE[state % 64] + 0.1 * _TABLE[state % 61]


class Letters(Text):
    """Token 0 is a, 1 is b, and so on."""

    def __init__(self) -> None:
        super().__init__(None)

    def decode(self, ids: Ids) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


@dataclass(frozen=True)
class Call:
    """One forward, as trouble sees it."""

    number: int
    rows: int
    """Sequences with one new token."""
    prefill_tokens: int
    contexts: list[list[int]]


Trouble = Callable[[Call], None]


class ToyRunner(Runner):
    """Keys are token ids, values their positions. ``trouble`` may raise before anything is written."""

    def __init__(self, pool: PagePool, trouble: Trouble | None) -> None:
        self.pool, self.trouble, self.calls = pool, trouble, 0

    def forward(self, packed: Packed) -> torch.Tensor:
        ends, lengths = packed.ends.tolist(), packed.lengths
        new = np.split(packed.tokens.numpy(), np.cumsum(lengths)[:-1])
        before = [self.read(table, start) for table, start in zip(packed.tables, packed.starts, strict=True)]
        self.calls += 1
        assert self.calls < 20_000, "it goes round in circles"
        if self.trouble is not None:
            contexts = [[*old, *tokens.tolist()] for old, tokens in zip(before, new, strict=True)]
            single = int((lengths == 1).sum())
            self.trouble(Call(self.calls, single, int(lengths[lengths > 1].sum()), contexts))
        assert packed.tables.shape[1] == -(-max(ends) // PAGE_SIZE)
        for tokens, table, start in zip(new, packed.tables, packed.starts.tolist(), strict=True):
            for position, token in enumerate(tokens.tolist(), start):
                self.write(table, position, token)
        return torch.stack([logits_of(self.read(t, n)) for t, n in zip(packed.tables, ends, strict=True)])

    def write(self, pages: IntArray, position: int, token: int) -> None:
        slab, page = divmod(int(pages[position // PAGE_SIZE]), self.pool.slab_pages)
        self.pool.slab(slab).keys[0][page, position % PAGE_SIZE] = token
        first = self.read(pages, 1)[0] if position else token
        self.pool.slab(slab).values[0][page, position % PAGE_SIZE] = torch.nan if first == BROKEN else position

    def read(self, pages: IntArray, length: int) -> list[int]:
        """The tokens so far; all that their last page holds besides must be finite, for attention reads it too."""
        length = int(length)
        keys: list[float] = []
        values: list[float] = []
        for page in pages[: -(-length // PAGE_SIZE)].tolist():
            slab, offset = divmod(page, self.pool.slab_pages)
            memory = self.pool.slab(slab)
            keys += memory.keys[0].numpy()[offset].ravel().tolist()
            values += memory.values[0].numpy()[offset].ravel().tolist()
        if keys and keys[0] != BROKEN:
            assert values[:length] == list(range(length)), "a page is not the one that was written"
            assert np.isfinite(values).all(), "what another row left would spoil this one's attention"
        return [int(key) for key in keys[:length]]


# -- one row at a time -----------------------------------------------------------------------------------


def expected(request: Request, number: int, context_limit: int | None = None) -> Record:
    """The record of one sample, with neither batch nor pages."""
    limit = request.params.max_new_tokens
    if context_limit is not None:
        limit = min(limit, context_limit - len(request.prompt_ids))
    return _expected(request.row_id, tuple(request.prompt_ids), request.params, request.seed, number, limit)


@cache
def _expected(
    row_id: str, prompt: tuple[int, ...], params: SamplingParams, seed: int, number: int, limit: int
) -> Record:
    rows = RowSampling(
        temperature=torch.tensor([params.temperature]),
        top_k=torch.tensor([params.top_k]),
        top_p=torch.tensor([params.top_p]),
        min_p=torch.tensor([params.min_p]),
        keys=torch.tensor([noise_key(seed, row_id)]),
        samples=torch.tensor([number]),
        most_top_k=params.top_k,
        any_top_p=params.top_p < 1,
        any_min_p=params.min_p > 0,
        any_greedy=params.temperature == 0,
    )
    tokens: list[int] = []
    logprobs: list[float] = []
    sampler: list[float] = []
    reason: FinishReason = "length"
    while len(tokens) < limit:
        drawn = sample(logits_of([*prompt, *tokens])[None], rows, torch.tensor([len(tokens)]))
        tokens.append(int(drawn.tokens))
        logprobs.append(float(drawn.logprobs))
        sampler.append(float(drawn.sampler_logprobs))
        text = Letters().decode(tokens)
        stopped = tokens[-1] in params.stop_token_ids or any(stop in text for stop in params.stop)
        if stopped or (tokens[-1] == EOS and not params.ignore_eos):
            reason = "stop"
            break
    text = Letters().decode(tokens)
    cut = min((at for at in map(text.find, params.stop) if at >= 0), default=len(text))
    return Record(row_id, number, list(prompt), tokens, text[:cut], logprobs, sampler, reason, seed=seed)


def all_expected(requests: Iterable[Request], context_limit: int | None = None) -> list[Record]:
    return [expected(request, number, context_limit) for request in requests for number in request.wanted_samples]


def assert_same(records: Sequence[Record], wanted: Sequence[Record]) -> None:
    """The same records in any order; log-probabilities to rounding."""
    assert len(records) == len(wanted)
    by_key = {(record.row_id, record.sample): record for record in records}
    assert len(by_key) == len(records)
    for want in wanted:
        got = by_key[want.row_id, want.sample]
        for name in ("prompt_ids", "completion_ids", "text", "finish_reason", "error_class", "seed"):
            assert getattr(got, name) == getattr(want, name), (want.row_id, want.sample, name)
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-5)
        assert got.sampler_logprobs == pytest.approx(want.sampler_logprobs, abs=1e-5)


KINDS = (
    SamplingParams(n=2, max_new_tokens=9),
    SamplingParams(n=1, max_new_tokens=25, temperature=0.0, ignore_eos=True),
    SamplingParams(n=3, max_new_tokens=30, temperature=0.8, top_p=0.9, ignore_eos=True),
    SamplingParams(n=1, max_new_tokens=40, top_k=5, stop=("a", "ef")),
    SamplingParams(n=2, max_new_tokens=40, min_p=0.05, stop_token_ids=(7, 11), ignore_eos=True),
    SamplingParams(n=1, max_new_tokens=1),
)


def many(count: int, seed: int) -> list[Request]:
    """Requests of all kinds, some with the prompt of the one before."""
    rng = random.Random(seed)
    requests: list[Request] = []
    for number in range(count):
        prompt = [rng.randrange(BROKEN) for _ in range(rng.randint(1, 22))]
        if requests and rng.random() < 0.2:
            prompt = list(requests[-1].prompt_ids)
        requests.append(Request(f"r{number}", prompt, KINDS[number % len(KINDS)], seed))
    return requests


def plain(count: int, tokens: int = 6, new: int = 8, n: int = 1) -> list[Request]:
    """Requests that differ in their prompts alone and never end early."""
    params = SamplingParams(n=n, max_new_tokens=new, ignore_eos=True)
    return [Request(f"p{i}", [(i + j) % BROKEN for j in range(tokens)], params) for i in range(count)]


# -- running it ------------------------------------------------------------------------------------------


class Fixed:
    """Always the same decision."""

    def __init__(
        self, rows: int = 8, prefill_tokens: int = 64, reason: str = "cap", decode_rows: int | None = None
    ) -> None:
        self.decision = Decision(rows, prefill_tokens, reason, decode_rows)

    def decide(self, observation: Observation) -> Decision:
        return self.decision


class Wild:
    """Anything, at random; what it is told must hold together."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def decide(self, observation: Observation) -> Decision:
        o = observation
        assert len(o.prompt_tokens) == len(o.generated_tokens) == len(o.max_new_tokens) == o.live_rows
        assert (o.generated_tokens <= o.max_new_tokens).all()
        assert o.kv_tokens_held % PAGE_SIZE == o.kv_tokens_free % PAGE_SIZE == 0
        assert o.page_tokens == PAGE_SIZE
        assert o.groups is not None
        assert o.ends_at_limit is not None
        assert o.waiting is not None
        assert len(o.groups) == len(o.ends_at_limit) == o.live_rows
        assert len(o.waiting) == min(64, o.waiting_rows)
        assert (o.waiting.generated_tokens <= o.waiting.max_new_tokens).all()
        rng = self.random
        return Decision(rng.randint(1, 10), rng.randint(1, 40), "wild", rng.choice([None, 0, 1, 2, 4]))


@dataclass
class World:
    """A loop over a toy model on a device of numbers; `run` runs it to its end."""

    requests: Iterable[Request]
    policy: Policy = field(default_factory=Fixed)
    pages: int = 1000
    """What the device has in all."""
    max_kv_pages: int | None = None
    trouble: Trouble | None = None
    context_limit: int | None = None
    read_first: int = 8
    weight_version: int = 0
    late: ClassVar[bool] = False
    """See `late_or_not`."""

    def __post_init__(self) -> None:
        self.reports: list[StepReport] = []
        self.memory: Memory | None = None
        self.headroom = FakeHeadroom(self.pages * PAGE, held=self.held)
        self.queue = Queue(self.requests, self.context_limit, VOCABULARY)
        self.queue.fill(self.read_first)
        cap = None if self.max_kv_pages is None else self.max_kv_pages * PAGE
        self.memory = Memory(LAYOUT, self.headroom, CPU, cap, 0.0, self.queue.demand)
        self.pool = self.memory.pool
        self.runner = ToyRunner(self.pool, self.trouble)
        self.loop = Loop(
            self.runner,
            self.memory,
            self,
            Letters(),
            [EOS],
            self.queue,
            self.weight_version,
            self.report,
            self.late,
        )

    def held(self) -> int:
        return 0 if self.memory is None else self.memory.pool.bytes_held

    def decide(self, observation: Observation) -> Decision:
        self.check()
        return self.policy.decide(observation)

    def report(self, report: StepReport) -> None:
        self.check()
        self.reports.append(report)

    def check(self) -> None:
        self.pool.check_integrity(self.loop._running.held_pages())

    def stream(self) -> Iterator[Record]:
        while True:
            self.loop.refill()
            records = self.loop.advance()
            if records is None:
                break
            yield from records
        self.check()
        assert self.pool.used_pages == 0
        self.loop.close()
        assert self.pool.bytes_held == 0

    def run(self) -> list[Record]:
        return list(self.stream())

    @property
    def tally(self) -> Tally:
        return self.loop.tally


@pytest.fixture(autouse=True, params=[False, True], ids=["at once", "late"])
def late_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test here runs with tokens that are read at once, and with such that are read a step late."""
    late: bool = request.param
    monkeypatch.setattr(World, "late", late)
    return late


# -- whatever the policy and memory ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_records_do_not_depend_on_policy_or_memory(seed: int) -> None:
    print("seed", seed)
    requests = many(14, seed)
    wanted = all_expected(requests)
    world = World(requests, Wild(seed), max_kv_pages=22)
    assert_same(world.run(), wanted)
    assert world.tally.preempted_rows > 0
    assert world.tally.samples == len(wanted)
    assert world.tally.error_samples == world.tally.out_of_memory_events == 0
    assert world.tally.output_tokens == sum(len(record.completion_ids) for record in wanted)
    assert world.tally.prompt_tokens == sum(len(record.prompt_ids) for record in wanted)
    assert world.tally.drawn_tokens == sum(report.new_tokens for report in world.reports)
    assert world.tally.prefilled_tokens == sum(report.prefill_tokens for report in world.reports)
    assert world.tally.preempted_rows == sum(report.preempted_rows for report in world.reports)
    assert all(report.kv_bytes <= 22 * PAGE for report in world.reports)
    assert {record.finish_reason for record in wanted} == {"stop", "length"}


def test_the_prompt_of_many_samples_is_prefilled_once() -> None:
    requests = plain(1, tokens=11, n=8)
    world = World(requests)
    assert_same(world.run(), all_expected(requests))
    assert world.tally.prefilled_tokens == 11
    assert (world.tally.live_rows_max, world.tally.preempted_rows) == (8, 0)


def test_paused_rows_keep_what_they_hold_and_go_on_when_older_ones_have_ended(late_or_not: bool) -> None:
    requests = plain(5, tokens=6, new=9)
    world = World(requests, Fixed(rows=5, decode_rows=2))
    assert_same(world.run(), all_expected(requests))
    assert (world.tally.preempted_rows, world.tally.prefilled_tokens) == (0, 5 * 6)
    # All draw their first token where their prefill ends; then no more than two decode at a time.
    assert [report.new_tokens for report in world.reports if report.new_tokens][:3] == [5, 2, 2]
    assert max(report.new_tokens for report in world.reports[1:]) == 2
    assert [report.paused_rows for report in world.reports[1:3]] == [3, 3]
    assert world.tally.paused_row_steps == sum(report.paused_rows for report in world.reports) > 0
    assert late_or_not or [report.live_rows for report in world.reports][8:11] == [5, 3, 3]


def test_a_policy_that_pauses_all_lets_one_go_on() -> None:
    requests = plain(3, tokens=6, new=5)
    world = World(requests, Fixed(rows=3, decode_rows=0))
    assert_same(world.run(), all_expected(requests))


def test_a_long_prompt_is_prefilled_in_parts_between_decodes() -> None:
    requests = [*plain(1, new=20), Request("long", list(range(28)), SamplingParams(max_new_tokens=3))]
    world = World(requests, Fixed(prefill_tokens=5))
    assert_same(world.run(), all_expected(requests))
    assert max(report.prefill_tokens for report in world.reports) == 5
    assert sum(report.prefill_tokens for report in world.reports) == 6 + 28
    long_steps = [report for report in world.reports if report.prefill_tokens == 5 and report.new_tokens]
    assert len(long_steps) >= 4, "the other row went on meanwhile"


def test_rows_end_as_they_should() -> None:
    prompts = {"eos": (5, 4), "ignored": (5, 4), "ids": (9, 9), "stop": (4, 1, 1), "context": (1, 2, 3)}
    params = {
        "eos": SamplingParams(n=6, max_new_tokens=400),
        "ignored": SamplingParams(n=2, max_new_tokens=80, ignore_eos=True),
        "ids": SamplingParams(n=3, max_new_tokens=400, stop_token_ids=(7, 3)),
        "stop": SamplingParams(n=4, max_new_tokens=400, stop=("d", "gh")),
        "context": SamplingParams(n=2, max_new_tokens=400, ignore_eos=True),
    }
    requests = [Request(name, prompt, params[name]) for name, prompt in prompts.items()]
    world = World(requests, context_limit=97)
    records = world.run()
    assert_same(records, all_expected(requests, context_limit=97))
    by_name = {name: [record for record in records if record.row_id == name] for name in prompts}
    assert all(record.completion_ids[-1] == EOS for record in by_name["eos"] if record.finish_reason == "stop")
    assert any(record.finish_reason == "stop" for record in by_name["eos"])
    assert all(EOS in record.completion_ids[:-1] for record in by_name["ignored"])
    assert {record.completion_ids[-1] for record in by_name["ids"]} <= {EOS, 3, 7}
    assert all(not set(record.completion_ids[:-1]) & {EOS, 3, 7} for record in by_name["ids"])
    assert all("d" not in record.text and "gh" not in record.text for record in by_name["stop"])
    assert any(len(record.text) < len(record.completion_ids) for record in by_name["stop"])
    assert {(r.finish_reason, len(r.completion_ids)) for r in by_name["context"]} == {("length", 94)}


def test_requests_that_cannot_run_are_errors_among_the_others() -> None:
    good = plain(2, n=2)
    bad = [
        Request("empty", [], SamplingParams(n=2)),
        Request("long", [1] * 50, SamplingParams()),
        Request("strange", [VOCABULARY], SamplingParams()),
    ]
    world = World([bad[0], good[0], bad[1], good[1], bad[2]], context_limit=50)
    records = world.run()
    errors = {(r.row_id, r.sample): r.error_class for r in records if r.finish_reason == "error"}
    assert errors == {
        ("empty", 0): "empty_prompt",
        ("empty", 1): "empty_prompt",
        ("long", 0): "prompt_too_long",
        ("strange", 0): "bad_prompt",
    }
    assert_same([record for record in records if record.finish_reason != "error"], all_expected(good))
    assert (world.tally.samples, world.tally.error_samples) == (8, 4)


def test_no_requests_are_no_records() -> None:
    assert World([]).run() == []


def test_records_and_reports_carry_what_they_were_given() -> None:
    world = World(plain(3, n=2), Fixed(rows=2, reason="memory"), weight_version=9)
    assert {record.weight_version for record in world.run()} == {9}
    assert [report.step for report in world.reports] == list(range(1, len(world.reports) + 1))
    assert {(report.row_target, report.reason) for report in world.reports} == {(2, "memory")}
    assert max(report.live_rows for report in world.reports) <= 2
    assert world.tally.steps == len(world.reports)


def test_a_loop_that_is_left_early_gives_everything_back() -> None:
    world = World(plain(30))
    stream = world.stream()
    for _ in range(5):
        next(stream)
    assert world.pool.bytes_held > 0
    world.loop.close()
    world.check()
    assert (world.pool.bytes_held, world.pool.used_pages) == (0, 0)


# -- the stream ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "pages", "ahead"), [(3, 1000, 4), (1, 1000, 2), (100, 16, 9)])
def test_the_stream_is_read_no_further_than_rows_may_be_admitted(
    rows: int, pages: int, ahead: int, late_or_not: bool
) -> None:
    """Live rows, and one that shows that more wait; where memory is the limit, about what fits besides.

    Others take the place of rows that have ended before their late records are out.
    """
    read = 0

    def stream() -> Iterator[Request]:
        nonlocal read
        for request in plain(40, tokens=6, new=7):
            read += 1
            yield request

    world = World(stream(), Fixed(rows), max_kv_pages=pages, read_first=1)
    most = done = 0
    for _ in world.stream():
        most = max(most, read - done)
        done += 1
    assert (read, done) == (40, 40)
    assert most <= ahead + late_or_not * world.tally.live_rows_max


def test_the_stream_s_end_is_waited_for() -> None:
    """A slow stream: rows that are alive do not finish the job while it may have more."""
    requests = plain(5)
    world = World(iter(requests), Fixed(rows=1), read_first=1)
    assert_same(world.run(), all_expected(requests))


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What never fits is given up soon."""
    monkeypatch.setattr(loop_module, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(loop_module, "_RETRY_S", 0.002)


def test_a_passing_squeeze_of_the_only_row_costs_nothing() -> None:
    trouble, raised = refuse_at(set(range(20, 35)))
    requests = plain(40, new=12)
    world = World(requests, Fixed(rows=1), trouble=trouble)
    assert_same(world.run(), all_expected(requests))
    assert len(raised) == 15


# -- out of memory ---------------------------------------------------------------------------------------


def refuse_at(calls: set[int], error: type[Exception] = torch.OutOfMemoryError) -> tuple[Trouble, list[int]]:
    """Fails at these calls, whatever they compute: a failure that passes must cost no row."""
    raised: list[int] = []

    def trouble(call: Call) -> None:
        if call.number in calls:
            raised.append(call.number)
            raise error("DefaultCPUAllocator: can't allocate memory: CUDA out of memory")

    return trouble, raised


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
    monkeypatch.setattr(loop_module, "_CALM_STEPS", 4)
    requests = many(10, seed)
    rng = random.Random(seed)
    trouble, raised = refuse_at({rng.randint(5 * i, 5 * i + 3) for i in range(1, 60)})
    world = World(requests, Wild(seed), trouble=trouble)
    assert_same(world.run(), all_expected(requests))
    assert len(raised) >= 8
    assert world.tally.out_of_memory_events == len(raised)


def refuse_rows(most: int) -> Trouble:
    """As a device does on which activations of more rows do not fit."""

    def trouble(call: Call) -> None:
        if call.rows > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return trouble


def test_a_device_that_holds_few_rows_is_found_out() -> None:
    requests = plain(20, new=12)
    world = World(requests, Fixed(rows=16, prefill_tokens=200), trouble=refuse_rows(3), read_first=20)
    assert_same(world.run(), all_expected(requests))
    assert world.tally.out_of_memory_events == 3  # at 16, 8 and 4 rows
    drawing = [(report.row_target, report.reason) for report in world.reports if report.new_tokens]
    assert drawing[0] == (16, "cap"), "their first tokens came from the prefill"
    assert set(drawing[1:]) == {(2, "oom")}


def test_the_cap_of_a_failure_is_lifted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "_CALM_STEPS", 6)
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


def refuse_draws(monkeypatch: pytest.MonkeyPatch, refuses: Callable[[int, int], bool]) -> list[int]:
    """Sampling needs memory too: fails where ``refuses(call number, rows)`` says so."""
    calls = 0
    raised: list[int] = []

    def refusing(logits: torch.Tensor, rows: RowSampling, positions: torch.Tensor) -> Sampled:
        nonlocal calls
        calls += 1
        assert calls < 5000, "it goes round in circles"
        if refuses(calls, len(logits)):
            raised.append(calls)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(logits, rows, positions)

    monkeypatch.setattr(loop_module, "sample", refusing)
    return raised


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


# -- numbers that are not finite -------------------------------------------------------------------------


@pytest.mark.parametrize("prefill_tokens", [64, 5])
def test_a_row_with_broken_logits_is_an_error_and_disturbs_nobody(prefill_tokens: int) -> None:
    """Its pages are taken by others, who must not find NaN in them: the toy's reader looks."""
    good = many(12, seed=1)
    params = SamplingParams(n=2, max_new_tokens=20)
    bad = [Request(f"bad{i}", [BROKEN, *range(i, i + 9)], params) for i in range(3)]
    mixed = [request for i in range(3) for request in (*good[4 * i : 4 * i + 4], bad[i])]
    world = World(mixed, Fixed(prefill_tokens=prefill_tokens), max_kv_pages=30)
    records = world.run()
    errors = [record for record in records if record.finish_reason == "error"]
    assert {(r.row_id, r.sample) for r in errors} == {(f"bad{i}", n) for i in range(3) for n in range(2)}
    assert {(r.error_class, r.error) for r in errors} == {("not_finite", "The model's logits are not finite.")}
    assert all(len(record.completion_ids) == 1 for record in errors)
    assert_same([record for record in records if record not in errors], all_expected(good))
    assert world.tally.error_samples == 6


# -- too large, and squeezed -----------------------------------------------------------------------------


def test_a_prompt_too_large_for_the_cap_is_an_error_and_the_job_goes_on() -> None:
    good = plain(4)
    large = Request("large", [1] * 60, SamplingParams(n=2, max_new_tokens=4))
    world = World([*good[:2], large, *good[2:]], max_kv_pages=12)
    records = world.run()
    errors = [record for record in records if record.finish_reason == "error"]
    assert [(r.row_id, r.sample, r.error_class, r.completion_ids) for r in errors] == [
        ("large", 0, "too_large", []),
        ("large", 1, "too_large", []),
    ]
    assert "more than 60 tokens" in errors[0].error
    assert_same([record for record in records if record not in errors], all_expected(good))


def test_a_row_that_outgrows_the_cap_is_an_error_with_what_it_has() -> None:
    good = plain(3, new=12)
    long = Request("long", [3, 4, 5], SamplingParams(max_new_tokens=200, ignore_eos=True))
    world = World([long, *good], max_kv_pages=12)
    records = world.run()
    (error,) = [record for record in records if record.finish_reason == "error"]
    assert (error.row_id, error.error_class) == ("long", "too_large")
    assert len(error.completion_ids) == 12 * PAGE_SIZE - 3 + 1, "the last token needs no page"
    whole = expected(long, 0)
    assert error.completion_ids == whole.completion_ids[: len(error.completion_ids)]
    assert error.logprobs == pytest.approx(whole.logprobs[: len(error.logprobs)], abs=1e-5)
    assert_same([record for record in records if record is not error], all_expected(good))


class Clock:
    """Time that passes only while somebody sleeps."""

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
    """One row is given up after the time; the next gets as much time of its own."""
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
def test_memory_follows_others_up_and_down(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    requests = many(14, seed)

    clock = Clock(monkeypatch, lambda _sleeps: None)
    world = World(requests, Fixed(rows=10), pages=100)
    report = world.loop._on_step
    assert report is not None

    def squeeze(done: StepReport) -> None:
        assert done.kv_bytes == world.held() <= world.headroom.total_bytes - world.headroom.taken_bytes
        report(done)
        if rng.random() < 0.2:
            world.headroom.taken_bytes = rng.choice([0, 60, 80, 90]) * PAGE

    world.loop._on_step = squeeze
    assert_same(world.run(), all_expected(requests))
    assert world.tally.preempted_rows > 0
    assert clock.sleeps < 5000


class Keeping(ToyRunner):
    """Has memory of its own until it is asked for it; telemetry takes it for free."""

    kept = 0

    @property
    def bytes_kept(self) -> int:
        return self.kept

    def shed(self) -> bool:
        had, self.kept = self.kept > 0, 0
        return had


@pytest.mark.parametrize(("taken", "sheds"), [(5, False), (25, True)])
def test_what_can_be_made_again_goes_before_rows_do(taken: int, sheds: bool) -> None:
    """Four rows hold 40 of 100 pages when others take some, and 52 in the end."""
    requests = plain(4, tokens=20, new=30)
    world = World(requests, Fixed(rows=4), pages=100)
    runner = Keeping(world.pool, None)
    runner.kept = 40 * PAGE
    world.runner = world.loop._runner = runner

    def squeeze(done: StepReport) -> None:
        if world.tally.steps == 20:
            world.headroom.taken_bytes = taken * PAGE

    world.loop._on_step = squeeze
    assert_same(world.run(), all_expected(requests))
    assert (runner.kept == 0) == sheds
    assert world.tally.preempted_rows == 0


def test_what_can_be_made_again_goes_when_the_allocator_fails() -> None:
    requests = plain(4)
    trouble, _ = refuse_at({5})
    world = World(requests, trouble=trouble)
    runner = Keeping(world.pool, trouble)
    runner.kept = 40 * PAGE
    world.runner = world.loop._runner = runner
    assert_same(world.run(), all_expected(requests))
    assert runner.kept == 0


# -- tokens that are read late ---------------------------------------------------------------------------


def assert_same_bits(records: Sequence[Record], wanted: Sequence[Record]) -> None:
    """Records and their numbers, such as are not finite included, in any order."""
    assert sorted(map(repr, records)) == sorted(map(repr, wanted))


def ending(count: int) -> list[Request]:
    """Rows that end in ways that are not known before their last token is, beside some that end by length."""
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
    wasted = worlds[1].tally.drawn_tokens - worlds[1].tally.output_tokens
    assert worlds[0].tally.drawn_tokens == worlds[0].tally.output_tokens
    assert 0 < wasted <= stopped, "rows that end by length waste none"


class Dip(Fixed):
    """One row may live at one decision, and many at all others."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.decisions = at, 0

    def decide(self, observation: Observation) -> Decision:
        self.decisions += 1
        return Decision(1, 64, "dip") if self.decisions == self.at else self.decision


@pytest.mark.parametrize("event", ["preempted", "squeezed", "forward refused", "draw refused", "short of pages"])
def test_whatever_happens_in_the_step_in_which_a_row_ends(event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event comes at every step in turn, so also where it meets a row that has ended and does not know it."""
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
                world.loop._on_step = squeezing(world, at)
            assert_same_bits(world.run(), wanted)
            happened += len(refused) + world.tally.preempted_rows
    assert happened > undisturbed.tally.steps // 3


def squeezing(world: World, at: int) -> Callable[[StepReport], None]:
    """Others take most of the device after one step, and give it back after the next."""

    def on_step(report: StepReport) -> None:
        world.report(report)
        world.headroom.taken_bytes = (world.pages - 5) * PAGE if report.step == at else 0

    return on_step


class Spoiling(ToyRunner):
    """What it computes from an end of sequence is not finite: a step too many leaves that in a page."""

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


def test_what_a_step_too_many_writes_spoils_nobody() -> None:
    params = SamplingParams(n=3, max_new_tokens=60)
    requests = [Request(f"s{i}", [3 + (i + j) % 20 for j in range(6)], params) for i in range(12)]
    world = World(requests, max_kv_pages=40)
    world.loop._runner = Spoiling(world.pool, None)  # type: ignore[assignment]
    records = world.run()
    assert_same(records, all_expected(requests))
    assert sum(record.completion_ids[-1] == EOS for record in records) > 20


def test_a_step_too_many_that_fails_costs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only row has ended, and nobody waits who could be given up for it."""
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


# -- telling ---------------------------------------------------------------------------------------------


def test_a_budget_that_cannot_be_kept_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Over(Fixed):
        def decide(self, observation: Observation) -> Decision:
            rows = 1 + len(observation.generated_tokens) % 2
            return Decision(rows, 64, "over_budget")

    with caplog.at_level(logging.INFO, logger="rollout.batcher"):
        World(plain(4), Over()).run()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "longer than the latency budget" in warnings[0].getMessage()


def test_changes_of_the_row_target_are_logged_with_their_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rollout.batcher"):
        World(plain(4), Fixed(rows=3, reason="memory")).run()
    assert [record.getMessage() for record in caplog.records] == ["step 0: row target None -> 3: memory"]


def test_a_target_that_changes_for_the_same_reason_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    class Falling:
        rows = 9

        def decide(self, observation: Observation) -> Decision:
            self.rows = max(2, self.rows - 1)
            return Decision(self.rows, 64, "memory" if self.rows > 4 else "latency")

    with caplog.at_level(logging.INFO, logger="rollout.batcher"):
        world = World(plain(3, new=20), Falling())
        world.run()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["step 0: row target None -> 8: memory", "step 4: row target 5 -> 4: latency"]
    assert world.tally.target_changes == 7


def test_the_policy_is_told_of_steps_and_of_finished_rows() -> None:
    told: list[Observation] = []

    class Listening(Fixed):
        def decide(self, observation: Observation) -> Decision:
            told.append(observation)
            return super().decide(observation)

    requests = plain(6, tokens=5, new=4)
    world = World(requests, Listening(rows=2))
    world.run()
    steps: list[Any] = [sample for observation in told for sample in observation.steps]
    finished = [row for observation in told for row in observation.finished]
    assert len(steps) == len(world.reports) - 1, "each once; the last was not followed by a decision"
    assert {(row.prompt_tokens, row.output_tokens, row.cut) for row in finished} == {(5, 4, True)}
    assert len(finished) == 4, "the last two ended in the last step"
    assert max(step.rows for step in steps) == 2
    assert sum(step.prefill_tokens for step in steps) == 30
    assert max(observation.live_rows for observation in told) == 2
    assert all((observation.prompt_tokens == 5).all() for observation in told)


def test_the_policy_is_told_what_rows_share_and_which_only_their_limit_ends() -> None:
    told: list[Observation] = []

    class Listening(Fixed):
        def decide(self, observation: Observation) -> Decision:
            told.append(observation)
            return super().decide(observation)

    endless = SamplingParams(n=3, max_new_tokens=6, ignore_eos=True)
    stopping = SamplingParams(n=2, max_new_tokens=6, ignore_eos=True, stop_token_ids=(11,))
    requests = [
        Request("a", [1, 2, 3, 4, 5], endless),
        Request("b", [1, 2, 3, 4, 5], stopping),
        Request("c", [6, 7, 8, 9], SamplingParams(max_new_tokens=400)),
    ]
    world = World(requests, Listening(rows=4))
    records = world.run()
    first, second = told[0].waiting, told[1]
    assert first is not None
    assert first.groups.tolist() == [0, 0, 0, 0, 0, 1], "equal prompts that follow each other are one group"
    assert first.ends_at_limit.tolist() == [True, True, True, False, False, False]
    assert (first.prompt_tokens.tolist(), first.max_new_tokens.tolist()) == ([5] * 5 + [4], [6] * 5 + [400])
    assert second.groups is not None
    assert second.ends_at_limit is not None
    assert second.waiting is not None
    assert (second.groups.tolist(), second.waiting.groups.tolist()) == ([0] * 4, [0, 1])
    assert second.ends_at_limit.tolist() == [True, True, True, False]
    cut = [row.cut for observation in told for row in observation.finished]
    assert len(cut) < len(records), "the last were told to nobody"
    by_stop = sum(record.finish_reason == "stop" for record in records)
    assert cut.count(False) in (by_stop, by_stop - 1)
