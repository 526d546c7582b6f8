"""The live batch against a dictionary of lists: each row keeps its own values whatever is added or removed."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from rollout.batcher.types import IntArray
from rollout.engine.batch_row import BatchRow, Completion, Group, noise_key
from rollout.engine.live_batch import LiveBatch
from rollout.requests import Request
from rollout.sampling_params import SamplingParams

PAGE_SIZE = 4
CPU = torch.device("cpu")


@dataclass
class Plain:
    """The expected values of one row."""

    row: BatchRow
    prompt: int
    pages: list[int]
    joined: int
    drawn: int
    """Tokens, including those not read yet."""
    last: int = 0
    ended: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampler: list[float] = field(default_factory=list)


def row_of(
    name: str,
    prompt: int,
    params: SamplingParams,
    sample: int = 0,
    done: int = 0,
    limit: int = 99,
    group_number: int = 7,
) -> BatchRow:
    group = Group(group_number, np.arange(prompt))
    row = BatchRow(Request(name, group.prompt_ids.tolist(), params, seed=3), sample, group, limit)
    if done:
        values = np.linspace(-1, -2, done).astype(np.float32)
        row.completion = Completion(np.arange(done) + 50, values, values / 2, np.arange(done))
    return row


def append(live: LiveBatch, slot: int, token: int) -> None:
    """Add a token that is read at once."""
    slots, positions = np.array([slot]), live.generated[[slot]]
    live.advance(slots, torch.tensor([token]))
    live.receive(slots, positions, np.array([token]), np.float32([-1]), np.float32([-1]))


class Model:
    """Rows by slot, oldest first, as dictionaries keep them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.live = LiveBatch(PAGE_SIZE, CPU)
        self.plain: dict[int, Plain] = {}
        self.pending: deque[tuple[list[int], list[int], list[int]]] = deque()
        """Slots, positions and tokens of draws not read yet."""
        self.count = self.page = 0

    @property
    def active(self) -> dict[int, Plain]:
        return {slot: plain for slot, plain in self.plain.items() if not plain.ended}

    def new_pages(self, count: int) -> list[int]:
        self.page += count
        return list(range(self.page - count, self.page))

    def add(self) -> None:
        rng = self.random
        params = SamplingParams(
            n=100,
            temperature=rng.choice([0.0, 0.5, 1.0]),
            top_k=rng.choice([0, 0, 5, 9]),
            top_p=rng.choice([1.0, 1.0, 0.5]),
            min_p=rng.choice([0.0, 0.0, 0.25]),
            stop=rng.choice([(), ("x",)]),
            stop_token_ids=rng.choice([(), (4,)]),
            ignore_eos=rng.random() < 0.5,
        )
        self.count += 1
        done = rng.choice([0, 0, 1, 7, 40])
        prompt = rng.randint(1, 90)
        row = row_of(f"row {self.count}", prompt, params, self.count % 100, done, rng.randint(done + 1, 99), self.count)
        pages = self.new_pages(-(-(prompt + done) // PAGE_SIZE))
        slot = self.live.add(row, np.array(pages))
        assert slot not in self.plain
        completion = row.completion
        self.plain[slot] = Plain(
            row,
            prompt,
            pages,
            done,
            done,
            tokens=completion.tokens.tolist(),
            logprobs=completion.logprobs.tolist(),
            sampler=completion.sampler_logprobs.tolist(),
        )

    def remove(self) -> None:
        free = [slot for slot in self.plain if all(slot not in slots for slots, _, _ in self.pending)]
        if free:
            slot = self.random.choice(free)
            self.live.remove(slot)
            del self.plain[slot]

    def end(self) -> None:
        """End a row at a token that is read; later tokens of it may still be pending."""
        if self.plain:
            slot = self.random.choice(list(self.plain))
            self.live.end(slot)
            self.plain[slot].ended = True
            assert self.live.ended[slot]

    def draw(self) -> None:
        """Draw a token for all rows, as most steps do, or for some, in any order."""
        everyone = self.random.random() < 0.5
        slots = list(self.active)
        if not everyone:
            slots = self.random.sample(slots, self.random.randint(0, len(slots)))
        if not slots:
            return
        tokens = [self.random.randrange(1000) for _ in slots]
        self.pending.append((slots, [self.plain[slot].drawn for slot in slots], tokens))
        self.live.advance(self.live.active if everyone else np.array(slots), torch.tensor(tokens))
        for slot, token in zip(slots, tokens, strict=True):
            plain = self.plain[slot]
            plain.drawn, plain.last = plain.drawn + 1, token
            plain.ended = plain.drawn == plain.row.limit

    def arrive(self) -> None:
        """Read the oldest pending draw, without tokens after their row's end."""
        if not self.pending:
            return
        slots, positions, tokens = (np.array(values) for values in self.pending.popleft())
        wanted = ~self.live.ended[slots]
        slots, positions, tokens = slots[wanted], positions[wanted], tokens[wanted]
        logprobs = np.array([-self.random.random() for _ in slots], np.float32)
        self.live.receive(slots, positions, tokens, logprobs, logprobs / 4)
        for slot, token, logprob in zip(slots.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            plain = self.plain[slot]
            plain.tokens.append(token)
            plain.logprobs.append(logprob)
            plain.sampler.append(logprob / 4)

    def step(self) -> None:
        """Give pages to the rows that need one, then a token to every row that has one."""
        lacking = self.live.without_page(self.live.active)
        assert lacking.tolist() == [
            slot for slot, p in self.active.items() if len(p.pages) * PAGE_SIZE < p.prompt + p.drawn
        ]
        if len(lacking):
            pages = self.new_pages(len(lacking))
            self.live.add_pages(lacking, np.array(pages))
            for slot, page in zip(lacking.tolist(), pages, strict=True):
                self.plain[slot].pages.append(page)

    def check(self) -> None:
        live, plain, active = self.live, self.plain, self.active
        slots = list(active)
        assert live.active.tolist() == slots
        assert live.occupied.tolist() == list(plain)
        assert len(live) == len(slots)
        assert live.all_rows() == [p.row for p in plain.values()]
        assert [pages.tolist() for pages in live.all_pages()] == [p.pages for p in plain.values()]
        assert live.lengths(live.active).tolist() == [p.prompt + p.drawn for p in active.values()]
        assert live.without_token().tolist() == [s for s, p in active.items() if p.drawn == p.joined]
        assert live.prompt_lengths[live.active].tolist() == [p.prompt for p in active.values()]
        assert live.generated[live.active].tolist() == [p.drawn for p in active.values()]
        assert live.received[live.occupied].tolist() == [len(p.tokens) for p in plain.values()]
        assert live.limits[live.occupied].tolist() == [p.row.limit for p in plain.values()]
        params = [p.row.request.params for p in plain.values()]
        assert live.ignore_eos[live.occupied].tolist() == [p.ignore_eos for p in params]
        assert live.ends_at_limit[live.occupied].tolist() == [
            p.ignore_eos and not p.stop and not p.stop_token_ids for p in params
        ]
        assert live.groups[live.occupied].tolist() == [p.row.group.number for p in plain.values()]
        assert live.has_stops[live.occupied].tolist() == [bool(p.stop) for p in params]
        own = [[*p.row.request.params.stop_token_ids, *p.row.request.end_ids] for p in plain.values()]
        assert [[i for i in ids if i >= 0] for ids in live.end_ids[live.occupied].tolist()] == own
        for token, p in zip(live.last_tokens(live.active).tolist(), active.values(), strict=True):
            assert p.drawn == p.joined or token == p.last
        for slot, p in plain.items():
            assert live.row(slot) is p.row
            completion = live.completion(slot)
            assert live.received_tokens(slot).tolist() == p.tokens
            assert completion.tokens.tolist() == p.tokens
            assert completion.logprobs.tolist() == p.logprobs
            assert completion.sampler_logprobs.tolist() == p.sampler
        if slots:
            self.check_sampling(live.active)
            self.check_sampling(live.active[: self.random.randint(1, len(slots))])

    def check_sampling(self, slots: IntArray) -> None:
        rows = [self.plain[slot].row for slot in slots.tolist()]
        params = [row.request.params for row in rows]
        sampling = self.live.sampling(slots)
        assert sampling.temperature.tolist() == [p.temperature for p in params]
        assert sampling.top_k.tolist() == [p.top_k for p in params]
        assert sampling.top_p.tolist() == [p.top_p for p in params]
        assert sampling.min_p.tolist() == [p.min_p for p in params]
        assert sampling.samples.tolist() == [row.sample for row in rows]
        assert sampling.keys.tolist() == [list(noise_key(3, row.request.row_id)) for row in rows]
        assert sampling.most_top_k == max(p.top_k for p in params)
        assert sampling.any_top_p == any(p.top_p < 1 for p in params)
        assert sampling.any_min_p == any(p.min_p > 0 for p in params)


@pytest.mark.parametrize("seed", range(5))
def test_any_sequence_of_operations_keeps_each_row_s_values(seed: int) -> None:
    print("seed", seed)
    model = Model(seed)
    for number in range(240):
        # Grows to more rows than the first slots hold, shrinks, and grows again into freed slots.
        growing = (number // 80) % 2 == 0
        operations = [model.draw, model.draw, model.arrive, model.arrive, model.step, model.end]
        operations += [model.add] * 5 if growing else [model.remove] * 4
        model.random.choice(operations)()
        if number % 5 == 0:
            model.remove()
        model.check()
    assert model.count > 35


def test_a_completion_is_a_copy() -> None:
    live = LiveBatch(PAGE_SIZE, CPU)
    slot = live.add(row_of("a", 3, SamplingParams(), done=2), np.array([0, 1]))
    before = live.completion(slot)
    append(live, slot, 7)
    live.remove(slot)
    other = live.add(row_of("b", 3, SamplingParams(), done=1), np.array([5]))
    append(live, other, 8)
    assert before.tokens.tolist() == [50, 51]


def test_tables_of_rows_are_views_that_may_be_rewritten() -> None:
    live = LiveBatch(PAGE_SIZE, CPU)
    first = live.add(row_of("a", 5, SamplingParams()), np.array([3, 4]))
    second = live.add(row_of("b", 2, SamplingParams()), np.array([9]))
    for pages in live.all_pages():
        pages += 100
    assert (live.pages(first).tolist(), live.pages(second).tolist()) == ([103, 104], [109])


def test_a_free_slot_has_no_row() -> None:
    live = LiveBatch(PAGE_SIZE, CPU)
    slot = live.add(row_of("a", 5, SamplingParams()), np.array([3, 4]))
    live.remove(slot)
    with pytest.raises(AssertionError, match="is free"):
        live.row(slot)


def test_sampling_tensors_are_made_once_a_batch() -> None:
    """And again when it changes: a slot that is taken again must not sample as its last row did."""
    live = LiveBatch(PAGE_SIZE, CPU)
    slot = live.add(row_of("a", 5, SamplingParams(temperature=0.5)), np.array([3, 4]))
    first = live.sampling(live.active)
    append(live, slot, 7)
    assert live.sampling(live.active) is first
    live.remove(slot)
    assert live.add(row_of("b", 5, SamplingParams(temperature=2.0)), np.array([3, 4])) == slot
    assert live.sampling(live.active).temperature.tolist() == [2.0]


def test_noise_keys_differ_by_seed_and_row_and_fit_32_bits() -> None:
    keys = {noise_key(seed, row_id) for seed in (0, 1, -1, 1 << 62) for row_id in ("", "0", "1", "é", "0:1", "a" * 999)}
    assert len(keys) == 24
    assert all(0 <= word < 1 << 32 for key in keys for word in key)
    # Pinned: draws of a seed must not change between versions.
    assert noise_key(0, "0") == (2124180693, 1657825639)
    assert noise_key(7, "é") == (943026154, 81324474)


def test_check_integrity_finds_narrow_tables_and_missing_pages() -> None:
    live = LiveBatch(PAGE_SIZE, CPU)
    slot = live.add(row_of("a", 9, SamplingParams()), np.arange(3))
    append(live, slot, 5)
    live.check_integrity()
    live.page_counts[slot] = 2
    with pytest.raises(AssertionError, match="too few pages"):
        live.check_integrity()
    live.page_counts[slot] = live.page_tables.shape[1] + 1
    with pytest.raises(AssertionError, match="page tables have 16 columns"):
        live.check_integrity()
