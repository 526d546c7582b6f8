"""The generation loop on a toy model, whose logits depend on the whole context, which it reads back from the pages.

A page that is lost, mixed up or overwritten changes what is generated.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from rollout.batcher.types import Decision, Observation, Policy
from rollout.engine import loop as loop_module
from rollout.engine.batch_row import noise_key
from rollout.engine.detokenizer import Detokenizer, Ids
from rollout.engine.early_stop import EarlyStop
from rollout.engine.kv_memory import KVMemory
from rollout.engine.loop import Loop
from rollout.engine.tp_sync import SingleProcess
from rollout.engine.waiting_queue import WaitingQueue
from rollout.headroom.fake import FakeHeadroom
from rollout.models.arrays import IntArray, ceil_div
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.runners.base import Runner
from rollout.models.sampling.sampler import RowSampling, Sampled, sample
from rollout.records import FinishReason, Record
from rollout.requests import Request, StepReport
from rollout.sampling_params import SamplingParams
from rollout.stats import Tally
from rollout.stop_conditions import StopConditions

PAGE_SIZE, VOCABULARY, EOS, BROKEN = 4, 30, 2, 29
LAYOUT = KVLayout((AttentionLayer(nn.Identity(), 1, 1, 1, MaskKind()),), torch.float32, PAGE_SIZE)
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


class Letters(Detokenizer):
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

    def forward(self, packed: ForwardBatch) -> torch.Tensor:
        ends, lengths = packed.seq_lens.tolist(), packed.query_lens
        new = np.split(packed.tokens.numpy(), np.cumsum(lengths)[:-1])
        before = [self.read(table, start) for table, start in zip(packed.page_tables, packed.prefix_lens, strict=True)]
        self.calls += 1
        assert self.calls < 20_000, "it goes round in circles"
        if self.trouble is not None:
            contexts = [[*old, *tokens.tolist()] for old, tokens in zip(before, new, strict=True)]
            single = int((lengths == 1).sum())
            self.trouble(Call(self.calls, single, int(lengths[lengths > 1].sum()), contexts))
        assert packed.page_tables.shape[1] == ceil_div(max(ends), PAGE_SIZE)
        for tokens, table, start in zip(new, packed.page_tables, packed.prefix_lens.tolist(), strict=True):
            for position, token in enumerate(tokens.tolist(), start):
                self.write(table, position, token)
        return torch.stack([logits_of(self.read(t, n)) for t, n in zip(packed.page_tables, ends, strict=True)])

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
        for page in pages[: ceil_div(length, PAGE_SIZE)].tolist():
            slab, offset = divmod(page, self.pool.slab_pages)
            memory = self.pool.slab(slab)
            keys += memory.keys[0].numpy()[offset].ravel().tolist()
            values += memory.values[0].numpy()[offset].ravel().tolist()
        if keys and keys[0] != BROKEN:
            assert values[:length] == list(range(length)), "a page is not the one that was written"
            assert np.isfinite(values).all(), "what another row left would spoil this one's attention"
        return [int(key) for key in keys[:length]]


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

    requests: Iterable[Request | None]
    policy: Policy = field(default_factory=Fixed)
    pages: int = 1000
    """What the device has in all."""
    max_kv_pages: int | None = None
    trouble: Trouble | None = None
    context_limit: int | None = None
    read_first: int = 8
    weight_version: int = 0
    stop: StopConditions | None = None
    reads_all: bool = True
    late: ClassVar[bool] = False
    """See `late_or_not`."""

    def __post_init__(self) -> None:
        self.reports: list[StepReport] = []
        self.memory: KVMemory | None = None
        self.headroom = FakeHeadroom(self.pages * PAGE, held=self.held)
        early_stop = None if self.stop is None else EarlyStop(self.stop, self.reads_all, SingleProcess())
        requests = self.requests if early_stop is None else early_stop.watched(self.requests)
        self.queue = WaitingQueue(requests, self.context_limit, VOCABULARY)
        self.queue.fill(self.read_first)
        cap = None if self.max_kv_pages is None else self.max_kv_pages * PAGE
        self.memory = KVMemory(LAYOUT, self.headroom, CPU, cap, 0.0, self.queue.max_tokens)
        self.pool = self.memory.pool
        self.runner = ToyRunner(self.pool, self.trouble)
        self.loop = Loop(
            runner=self.runner,
            kv=self.memory,
            policy=self,
            queue=self.queue,
            detokenizer=Letters(),
            eos_ids=[EOS],
            weight_version=self.weight_version,
            on_step=self.report,
            overlap=self.late,
            early_stop=early_stop,
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
        self.pool.check_integrity(self.loop._scheduler.held_pages())

    def stream(self) -> Iterator[Record]:
        while True:
            self.loop.refill()
            records = self.loop.advance()
            if records is None:
                break
            yield from records
        self.check()
        assert self.memory is not None
        assert self.memory.used_pages == 0
        self.loop.close()
        assert self.pool.bytes_held == 0

    def run(self) -> list[Record]:
        return list(self.stream())

    @property
    def tally(self) -> Tally:
        return self.loop.tally


def refuse_at(calls: set[int], error: type[Exception] = torch.OutOfMemoryError) -> tuple[Trouble, list[int]]:
    """Fails at these calls, whatever they compute: a failure that passes must cost no row."""
    raised: list[int] = []

    def trouble(call: Call) -> None:
        if call.number in calls:
            raised.append(call.number)
            raise error("DefaultCPUAllocator: can't allocate memory: CUDA out of memory")

    return trouble, raised


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
