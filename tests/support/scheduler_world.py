"""Rows on pages of numbers that tell whose they are: whatever the scheduler loses or mixes up is seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from rollout.engine.batch_builder import build_forward_batch
from rollout.engine.batch_row import BatchRow, PrefillChunk
from rollout.engine.kv_memory import KVMemory
from rollout.engine.scheduler import Scheduler
from rollout.engine.waiting_queue import WaitingQueue
from rollout.headroom.fake import FakeHeadroom
from rollout.models.arrays import IntArray
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind, StateTensor
from rollout.requests import Request
from rollout.sampling_params import SamplingParams
from rollout.stats import Tally

PAGE_SIZE, SLAB_PAGES = 4, 4
LAYOUT = KVLayout((AttentionLayer(nn.Identity(), 1, 1, 1, MaskKind()),), torch.float32, PAGE_SIZE)
#: The same, and a state of one number.
RECURRENT = replace(LAYOUT, states=(StateTensor(0, "recurrent", 0, (1,), torch.float32),))
ALL = 10**6


def folded(tokens: Sequence[int], state: int = 7) -> int:
    """What a toy recurrence sums up of a text."""
    for token in tokens:
        state = (state * 31 + token + 1) % 9973
    return state


class World:
    """Running rows over memory of some slabs, and a model whose keys are token ids and whose values are positions.

    With a layout that has a state, the model also folds each row's tokens into that.
    """

    def __init__(self, requests: Sequence[Request], slabs: int = 50, layout: KVLayout = LAYOUT) -> None:
        self.memory: KVMemory | None = None
        slab_bytes = SLAB_PAGES * layout.bytes_per_page
        self.headroom = FakeHeadroom(slabs * slab_bytes, held=self.held)
        self.memory = KVMemory(layout, self.headroom, torch.device("cpu"), None, 0.0, 4 * SLAB_PAGES * PAGE_SIZE)
        self.pool = self.memory.pool
        # A slab is a share of memory, which is too little for these tests.
        self.pool.slab_pages = self.pool.states.slab_pages = SLAB_PAGES
        self.per_row = len(layout.states)
        self.queue = WaitingQueue(requests, None, ALL)
        self.queue.fill(ALL)
        self.tally = Tally()
        self.scheduler = Scheduler(kv=self.memory, queue=self.queue, tally=self.tally, settle=self.settle)
        self.live = self.scheduler.live
        self.ended: list[int] = []
        self.drawn: dict[int, list[int]] = {}
        """Tokens that were drawn for each row, by the row's identity."""

    def held(self) -> int:
        return 0 if self.memory is None else self.memory.bytes_held

    def settle(self) -> bool:
        """Rows that turn out to have ended; see `test_rows_that_have_ended_make_way_for_those_that_go_on`."""
        ended, self.ended = self.ended, []
        for slot in ended:
            self.scheduler.leave(slot)
        return bool(ended)

    # -- what a step does --------------------------------------------------------------------------------

    def admit(self, rows: int = ALL, tokens: int = ALL) -> int | None:
        assert self.memory is not None
        self.memory.read_headroom()
        lacking = self.scheduler.admit(rows, tokens)
        self.check()
        return lacking

    def forward_batch(self, slots: IntArray, chunks: Sequence[PrefillChunk] = ()) -> ForwardBatch | None:
        return build_forward_batch(self.live, slots, chunks, self.pool.layout)

    def prefill(self, tokens: int = ALL) -> IntArray:
        parts = self.scheduler.prefill_chunks(tokens)
        for prefill, length in parts:
            for position in range(prefill.computed, prefill.computed + length):
                self.write(int(prefill.pages[position // PAGE_SIZE]), position, int(prefill.context[position]))
            for page in prefill.states[:1]:
                assert length == len(prefill.context), "a context is computed whole"
                self.fold(page, folded(prefill.context.tolist()))
        slots, chunks = self.scheduler.finish_chunks(parts)
        self.check()
        if not len(slots):
            return slots
        rows = [row for i, (prefill, _) in enumerate(parts) for row in prefill.rows[: int((chunks == i).sum())]]
        assert [self.live.row(slot) for slot in slots.tolist()] == rows
        self.draw(slots)
        return slots

    def decode(self, most: int | None = None) -> None:
        slots = self.scheduler.make_room(most)
        self.check()
        if len(slots):
            for slot, token, length in zip(
                slots, self.live.last_tokens(slots).tolist(), self.live.lengths(slots), strict=True
            ):
                self.write(int(self.live.pages(slot)[(length - 1) // PAGE_SIZE]), int(length) - 1, token)
                for page in self.live.states[slot]:
                    self.fold(page, folded([token], self.state(page)))
            self.draw(slots)

    def draw(self, slots: IntArray) -> None:
        tokens = np.array([self.next_token(self.live.row(slot)) for slot in slots.tolist()])
        positions = self.live.generated[slots]
        self.live.advance(slots, torch.from_numpy(tokens))
        self.live.receive(slots, positions, tokens, -tokens.astype(np.float32), -tokens.astype(np.float32))
        self.check()

    def next_token(self, row: BatchRow) -> int:
        drawn = self.drawn.setdefault(id(row), [])
        drawn.append(1000 + 100 * row.sample + len(drawn))
        return drawn[-1]

    def write(self, page: int, position: int, token: int) -> None:
        slab = self.pool.slab(page // SLAB_PAGES)
        slab.keys[0][page % SLAB_PAGES, position % PAGE_SIZE] = token
        slab.values[0][page % SLAB_PAGES, position % PAGE_SIZE] = position

    def state(self, page: int) -> int:
        slab, place = divmod(int(page), SLAB_PAGES)
        return int(self.pool.states.slab(slab).tensors[0][place])

    def fold(self, page: int, state: int) -> None:
        slab, place = divmod(int(page), SLAB_PAGES)
        self.pool.states.slab(slab).tensors[0][place] = state

    def read(self, pages: IntArray) -> list[tuple[int, int]]:
        pairs = []
        for page in pages.tolist():
            slab = self.pool.slab(page // SLAB_PAGES)
            keys, values = (x[0][page % SLAB_PAGES].flatten().tolist() for x in (slab.keys, slab.values))
            pairs += [(int(key), int(value)) for key, value in zip(keys, values, strict=True)]
        return pairs

    @property
    def used_pages(self) -> int:
        """Pages that rows use."""
        assert self.memory is not None
        return self.memory.used_pages

    # -- what must be so ---------------------------------------------------------------------------------

    def check(self) -> None:
        scheduler, pool = self.scheduler, self.pool
        pool.check_integrity(scheduler.held_pages())
        pool.states.check_integrity(scheduler.held_states())
        assert self.memory is not None
        self.memory.cache.check_integrity()
        fresh = set(self.live.without_token().tolist())
        for slot in self.live.active.tolist():
            row, completion = self.live.row(slot), self.live.completion(slot)
            assert completion.tokens.tolist() == self.drawn.get(id(row), [])
            context = [*row.group.prompt_ids.tolist(), *completion.tokens.tolist()]
            stored = context if slot in fresh else context[:-1]
            self.holds(self.live.pages(slot), stored)
            assert [self.state(page) for page in self.live.states[slot]] == [folded(stored)] * self.per_row
        for prefill in scheduler.prefills:
            assert prefill.rows
            assert len(prefill.states) == self.per_row * len(prefill.rows)
            self.holds(prefill.pages, prefill.context.tolist()[: prefill.computed])
        holders: dict[int, int] = {}
        for row in self.live.all_rows():
            holders[id(row.group)] = holders.get(id(row.group), 0) + 1
        assert all(row.group.holders == holders[id(row.group)] for row in self.live.all_rows())
        assert scheduler.alive == len(self.live) + sum(len(prefill.rows) for prefill in scheduler.prefills)

    def holds(self, pages: IntArray, tokens: list[int]) -> None:
        assert self.read(pages)[: len(tokens)] == list(zip(tokens, range(len(tokens)), strict=True))

    # -- shorthand ---------------------------------------------------------------------------------------

    def waiting(self) -> list[str]:
        return [f"{row.request.row_id}{row.sample}" for row in self.queue._rows]

    def alive(self) -> list[str]:
        return [f"{row.request.row_id}{row.sample}" for row in self.live.all_rows()]

    def all_ends(self) -> list[str]:
        """Run until every row has joined the live batch and left it again; the rows in the order of leaving."""
        left: list[str] = []
        for _ in range(10_000):
            if not len(self.queue) and not self.scheduler.alive:
                return left
            self.admit()
            self.prefill()
            for slot in self.live.active.tolist():
                row = self.live.row(slot)
                left.append(f"{row.request.row_id}{row.sample}")
                self.scheduler.leave(slot)
        raise AssertionError(f"{len(self.queue)} rows wait for ever")

    def all_live(self) -> World:
        self.admit()
        self.prefill()
        assert not self.scheduler.prefills
        return self


def request(name: str, tokens: int, n: int = 1, start: int = 0) -> Request:
    return Request(name, list(range(start, start + tokens)), SamplingParams(n=n, max_new_tokens=500))
