"""Rows that hold pages: they share, fork, make way and come back, and every page keeps what was computed into it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rollout.engine.batch_row import Row
from rollout.engine.kv_memory import Memory
from rollout.engine.scheduler import Running
from rollout.engine.waiting_queue import Queue
from rollout.headroom.fake import FakeHeadroom
from rollout.models.arrays import IntArray
from rollout.models.kv_cache.layout import KVLayout, Site, Span, State
from rollout.requests import Request
from rollout.sampling_params import SamplingParams
from rollout.stats import Tally

PAGE_SIZE, SLAB_PAGES = 4, 4
LAYOUT = KVLayout((Site(nn.Identity(), 1, 1, 1, Span()),), torch.float32, PAGE_SIZE)
#: The same, and a state of one number.
RECURRENT = replace(LAYOUT, states=(State(0, "recurrent", 0, (1,), torch.float32),))
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
        self.memory: Memory | None = None
        slab_bytes = SLAB_PAGES * layout.bytes_per_page
        self.headroom = FakeHeadroom(slabs * slab_bytes, held=self.held)
        self.memory = Memory(layout, self.headroom, torch.device("cpu"), None, 0.0, 4 * SLAB_PAGES * PAGE_SIZE)
        self.pool = self.memory.pool
        # A slab is a share of memory, which is too little for these tests.
        self.pool.slab_pages = self.pool.states.slab_pages = SLAB_PAGES
        self.per_row = len(layout.states)
        self.queue = Queue(requests, None, ALL)
        self.queue.fill(ALL)
        self.tally = Tally()
        self.running = Running(self.memory, self.queue, self.tally, self.settle)
        self.live = self.running.live
        self.ended: list[int] = []
        self.drawn: dict[int, list[int]] = {}
        """Tokens that were drawn for each row, by the row's identity."""

    def held(self) -> int:
        return 0 if self.memory is None else self.memory.bytes_held

    def settle(self) -> bool:
        """Rows that turn out to have ended; see `test_rows_that_have_ended_make_way_for_those_that_go_on`."""
        ended, self.ended = self.ended, []
        for slot in ended:
            self.running.leave(slot)
        return bool(ended)

    # -- what a step does --------------------------------------------------------------------------------

    def admit(self, rows: int = ALL, tokens: int = ALL) -> int | None:
        assert self.memory is not None
        self.memory.read()
        lacking = self.running.admit(rows, tokens)
        self.check()
        return lacking

    def prefill(self, tokens: int = ALL) -> IntArray:
        parts = self.running.prefill_parts(tokens)
        for prefill, length in parts:
            for position in range(prefill.computed, prefill.computed + length):
                self.write(int(prefill.pages[position // PAGE_SIZE]), position, int(prefill.context[position]))
            prefill.computed += length
            for page in prefill.states[:1]:
                assert length == len(prefill.context), "a context is computed whole"
                self.fold(page, folded(prefill.context.tolist()))
        ready = [prefill for prefill, _ in parts if not prefill.remaining]
        self.check()
        if not ready:
            return np.zeros(0, np.int64)
        sources = self.running.go_live(ready)
        slots = self.live.active[-len(sources) :]
        self.check()
        rows = [row for prefill in ready for row in prefill.rows[: int((sources == ready.index(prefill)).sum())]]
        assert [self.live.row(slot) for slot in slots.tolist()] == rows
        self.draw(slots)
        return slots

    def decode(self, most: int | None = None) -> None:
        slots = self.running.make_room(most)
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

    def next_token(self, row: Row) -> int:
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

    # -- what must be so ---------------------------------------------------------------------------------

    def check(self) -> None:
        running, pool = self.running, self.pool
        pool.check_integrity(running.held_pages())
        pool.states.check_integrity(running.held_states())
        fresh = set(self.live.without_token().tolist())
        for slot in self.live.active.tolist():
            row, completion = self.live.row(slot), self.live.completion(slot)
            assert completion.tokens.tolist() == self.drawn.get(id(row), [])
            context = [*row.group.prompt_ids.tolist(), *completion.tokens.tolist()]
            stored = context if slot in fresh else context[:-1]
            self.holds(self.live.pages(slot), stored)
            assert [self.state(page) for page in self.live.states[slot]] == [folded(stored)] * self.per_row
            full = 0 if self.per_row else len(row.group.prompt_ids) // PAGE_SIZE
            assert len(row.group.pages) == full
            self.holds(row.group.pages, row.group.prompt_ids.tolist()[: full * PAGE_SIZE])
        for prefill in running.prefills:
            assert prefill.rows
            assert len(prefill.states) == self.per_row * len(prefill.rows)
            self.holds(prefill.pages, prefill.context.tolist()[: prefill.computed])
        holders: dict[int, int] = {}
        for row in self.live.all_rows():
            holders[id(row.group)] = holders.get(id(row.group), 0) + 1
        assert all(row.group.holders == holders[id(row.group)] for row in self.live.all_rows())
        assert running.alive == len(self.live) + sum(len(prefill.rows) for prefill in running.prefills)

    def holds(self, pages: IntArray, tokens: list[int]) -> None:
        assert self.read(pages)[: len(tokens)] == list(zip(tokens, range(len(tokens)), strict=True))

    # -- shorthand ---------------------------------------------------------------------------------------

    def waiting(self) -> list[str]:
        return [f"{row.request.row_id}{row.sample}" for row in self.queue._rows]

    def alive(self) -> list[str]:
        return [f"{row.request.row_id}{row.sample}" for row in self.live.all_rows()]

    def all_live(self) -> World:
        self.admit()
        self.prefill()
        assert not self.running.prefills
        return self


def request(name: str, tokens: int, n: int = 1, start: int = 0) -> Request:
    return Request(name, list(range(start, start + tokens)), SamplingParams(n=n, max_new_tokens=500))


# -- sharing ---------------------------------------------------------------------------------------------


def test_samples_of_a_prompt_share_its_full_pages_and_copy_the_last() -> None:
    world = World([request("a", 10, n=4)]).all_live()
    pages = world.live.all_pages()
    assert world.alive() == ["a0", "a1", "a2", "a3"]
    assert {tuple(own[:2].tolist()) for own in pages} == {tuple(pages[0][:2].tolist())}
    assert len({int(own[2]) for own in pages}) == 4
    assert world.pool.used_pages == 2 + 4
    for _ in range(9):
        world.decode()


def test_a_prompt_of_whole_pages_has_nothing_to_copy() -> None:
    world = World([request("a", 8, n=3)]).all_live()
    assert world.pool.used_pages == 2
    world.decode()
    assert world.pool.used_pages == 2 + 3


def test_a_prompt_shorter_than_a_page_is_copied_whole() -> None:
    world = World([request("a", 3, n=3)]).all_live()
    assert world.pool.used_pages == 3
    world.decode()
    world.decode()
    assert world.pool.used_pages == 6


def test_the_prompt_of_a_group_is_computed_once() -> None:
    world = World([request("a", 10, n=3), request("b", 10), request("c", 10, start=50)])
    world.admit()
    assert [len(prefill.rows) for prefill in world.running.prefills] == [4, 1]
    assert sum(length for _, length in world.running.prefill_parts(ALL)) == 20
    world.prefill()
    assert world.alive() == ["a0", "a1", "a2", "b0", "c0"]


def test_rows_join_a_prefill_that_is_under_way() -> None:
    world = World([request("a", 10, n=2)])
    world.admit(rows=1)
    world.prefill(tokens=6)
    assert world.running.prefills[0].computed == 6
    world.admit(rows=2, tokens=6)
    assert [len(prefill.rows) for prefill in world.running.prefills] == [2]
    world.prefill(tokens=6)
    assert world.alive() == ["a0", "a1"]


@pytest.mark.parametrize(("tokens", "computed", "used"), [(10, 8, 4), (8, 4, 3), (3, 0, 2), (12, 8, 4)])
def test_rows_that_come_late_share_full_pages_and_compute_the_rest(tokens: int, computed: int, used: int) -> None:
    """At least the last token is computed: its logits are needed."""
    world = World([request("a", tokens, n=2)])
    world.admit(rows=1)
    world.prefill()
    world.admit(rows=2)
    (prefill,) = world.running.prefills
    assert prefill.computed == computed
    assert prefill.remaining == tokens - computed
    world.prefill()
    assert world.pool.used_pages == used
    assert world.alive() == ["a0", "a1"]


def test_pages_of_a_prompt_outlive_the_row_that_computed_them() -> None:
    world = World([request("a", 10, n=3)])
    world.admit(rows=2)
    world.prefill()
    world.running.leave(int(world.live.active[0]))
    world.check()
    world.admit(rows=2)
    assert world.running.prefills[0].computed == 8
    world.running.leave(int(world.live.active[0]))
    world.check()
    world.prefill()
    assert world.alive() == ["a2"]
    assert world.pool.used_pages == 3
    world.running.leave(int(world.live.active[0]))
    world.check()
    assert world.pool.used_pages == 0


def test_two_prefills_of_one_prompt_do_not_free_each_other_s_pages() -> None:
    """A preempted row computes its prompt again while a fresh sample of it does so for the first time."""
    world = World([request("a", 10, n=3)])
    world.admit(rows=1)
    world.prefill()
    world.decode()
    world.running.preempt(int(world.live.active[0]))
    assert world.waiting() == ["a0", "a1", "a2"]
    world.admit(rows=3)
    assert [len(prefill.rows) for prefill in world.running.prefills] == [1, 2]
    world.prefill()
    assert world.alive() == ["a0", "a1", "a2"]
    for slot in world.live.active.tolist():
        world.decode()
        world.running.leave(slot)
        world.check()
    assert world.pool.used_pages == 0


# -- admitting -------------------------------------------------------------------------------------------


def test_rows_are_admitted_in_order_up_to_the_target() -> None:
    world = World([request(name, 5, start=10 * i) for i, name in enumerate("abcd")])
    world.admit(rows=3)
    assert (world.running.alive, world.waiting()) == (3, ["d0"])
    world.admit(rows=2)
    assert world.running.alive == 3
    world.prefill()
    assert world.alive() == ["a0", "b0", "c0"]


def test_admission_stops_when_prefill_tokens_are_spoken_for() -> None:
    world = World([request(name, 5, start=10 * i) for i, name in enumerate("abcd")])
    world.admit(tokens=6)
    assert world.waiting() == ["c0", "d0"], "the second still begins within six tokens"
    world.admit(tokens=6)
    assert world.waiting() == ["c0", "d0"]
    assert [length for _, length in world.running.prefill_parts(6)] == [5, 1]
    world.prefill(tokens=6)
    world.admit(tokens=6)
    assert world.waiting() == ["d0"]


def test_prefill_goes_on_oldest_first_in_parts() -> None:
    world = World([request("a", 9), request("b", 6, start=20)])
    world.admit()
    seen = []
    while world.running.prefills:
        parts = world.running.prefill_parts(4)
        seen.append([(p.rows[0].request.row_id, p.computed, length) for p, length in parts])
        world.prefill(4)
    assert seen == [[("a", 0, 4)], [("a", 4, 4)], [("a", 8, 1), ("b", 0, 3)], [("b", 3, 3)]]


def test_a_step_packs_the_last_token_of_each_live_row_and_then_the_parts_of_prefills() -> None:
    world = World([request("a", 5), request("b", 9, start=20), request("c", 6, start=40)])
    assert world.running.packed(world.live.active, []) is None
    world.admit(rows=1)
    world.prefill()
    world.decode()
    world.admit()
    world.prefill(3)
    world.running.make_room(None)
    parts = world.running.prefill_parts(8)
    packed = world.running.packed(world.live.active, parts)
    assert packed is not None
    a, (b, c) = world.live.pages(0), (prefill.pages for prefill in world.running.prefills)
    assert packed.starts.tolist() == [6, 3, 0]
    assert packed.lengths.tolist() == [1, 6, 2]
    assert packed.tokens.tolist() == [*world.live.last_tokens(world.live.active).tolist(), *range(23, 29), 40, 41]
    assert packed.positions.tolist() == [6, 3, 4, 5, 6, 7, 8, 0, 1]
    size = PAGE_SIZE
    wanted = [(a, 6), *((b, i) for i in range(3, 9)), (c, 0), (c, 1)]
    assert packed.slots(size).tolist() == [pages[i // size] * size + i % size for pages, i in wanted]
    assert packed.tables.shape == (3, 3)


def test_a_row_that_does_not_fit_says_what_it_lacks_only_on_an_empty_device() -> None:
    world = World([request("a", 5), request("b", 40, start=50)], slabs=2)
    assert world.admit() is None
    assert world.waiting() == ["b0"]
    world.prefill()
    assert world.admit() is None
    world.running.leave(int(world.live.active[0]))
    assert world.admit() == 11, "ten pages, and one for its first token"
    assert world.pool.used_pages == 0


def test_an_admitted_row_always_lives_to_add_a_token() -> None:
    world = World([request("a", 32)], slabs=2)
    assert world.admit() == 9
    world = World([request("a", 31)], slabs=2).all_live()
    world.decode()
    assert world.tally.preempted_rows == 0
    world.decode()
    assert world.tally.preempted_rows == 1


@pytest.mark.parametrize(("tokens", "fits"), [(683, True), (684, False)])
def test_admission_leaves_room_for_what_live_rows_add(tokens: int, fits: bool) -> None:
    """Of 200 pages 25 are used and four left alone; a row needs room for one token more than its prompt."""
    world = World([request("a", 97), request("b", tokens, start=1000)])
    world.admit(rows=1)
    world.prefill()
    world.admit()
    assert (world.waiting() == []) == fits


@pytest.mark.parametrize("layout", [LAYOUT, RECURRENT])
def test_a_fork_that_does_not_fit_waits_its_turn(layout: KVLayout) -> None:
    """Pages were there at admission, and others took them since."""
    world = World([request("a", 6, n=6)], slabs=3, layout=layout)
    world.admit(rows=6)
    assert len(world.running.prefills[0].rows) == 6
    taken = world.pool.allocate(world.pool.free_pages - 2)
    world.headroom.taken_bytes = 10**9
    assert world.memory is not None
    world.memory.read()
    extra = world.running.held_pages
    world.running.held_pages = lambda: [*extra(), taken]  # type: ignore[method-assign]
    world.prefill()
    assert world.alive() == ["a0", "a1", "a2"]
    assert world.waiting() == ["a3", "a4", "a5"]
    assert world.pool.free_pages == 0


def test_rows_that_come_later_leave_room_for_the_forks_of_those_before() -> None:
    world = World([request("a", 6, n=3), *(request(name, 6, start=10 * i) for i, name in enumerate("bcd", 1))], slabs=2)
    world.admit()
    assert world.waiting() == ["c0", "d0"]
    world.prefill()
    assert world.alive() == ["a0", "a1", "a2", "b0"]


# -- making way ------------------------------------------------------------------------------------------


def test_the_youngest_rows_make_way_and_keep_their_tokens() -> None:
    world = World([request(name, 5, start=10 * i) for i, name in enumerate("abc")]).all_live()
    for _ in range(3):
        world.decode()
    kept = world.live.completion(int(world.live.active[2])).tokens.tolist()
    world.running.preempt_beyond(1)
    world.check()
    assert (world.alive(), world.waiting()) == (["a0"], ["b0", "c0"])
    assert len(kept) == 4
    world.admit()
    assert [prefill.context.tolist()[5:] for prefill in world.running.prefills] == [
        world.drawn[id(prefill.rows[0])] for prefill in world.running.prefills
    ]
    assert world.running.prefills[1].context.tolist() == [20, 21, 22, 23, 24, *kept]
    world.prefill()
    world.decode()
    assert world.alive() == ["a0", "b0", "c0"]
    assert world.live.completion(int(world.live.active[2])).tokens.tolist()[:4] == kept
    assert world.tally.preempted_rows == 2
    assert world.tally.recomputed_tokens == 2 * (5 + 3)


def test_prefills_make_way_before_rows_that_decode() -> None:
    world = World([request("a", 5), request("b", 9, n=2, start=50)])
    world.admit(rows=1)
    world.prefill()
    world.admit()
    world.prefill(tokens=6)
    assert world.running.preempt_youngest()
    world.check()
    assert (world.waiting(), len(world.running.prefills)) == (["b1"], 1)
    assert world.tally.recomputed_tokens == 0
    assert world.running.preempt_youngest()
    world.check()
    assert (world.waiting(), len(world.running.prefills)) == (["b0", "b1"], 0)
    assert world.tally.recomputed_tokens == 6
    assert world.running.preempt_youngest()
    assert world.waiting() == ["a0", "b0", "b1"]
    assert not world.running.preempt_youngest()
    assert (world.pool.used_pages, world.tally.preempted_rows) == (0, 3)
    assert world.all_live().alive() == ["a0", "b0", "b1"], "a prompt whose prefill was given up is begun anew"


def test_a_step_makes_room_by_preempting_the_youngest() -> None:
    world = World([request(name, 6, start=10 * i) for i, name in enumerate("abc")], slabs=2).all_live()
    assert world.alive() == ["a0", "b0", "c0"]
    for _ in range(30):
        world.decode()
        if world.tally.preempted_rows:
            break
    assert world.alive()[0] == "a0"
    while len(world.live) > 1:
        world.decode()
    assert (world.alive(), world.waiting()) == (["a0"], ["b0", "c0"])
    while world.pool.free_pages:
        world.decode()
    assert world.alive() == ["a0"]
    for _ in range(PAGE_SIZE):
        world.decode()
    assert world.waiting() == ["a0", "b0", "c0"], "a row that outgrew memory alone goes back too"


def test_the_row_that_costs_least_to_compute_again_makes_way_for_pages() -> None:
    """Here not the youngest: a sample whose prompt another one keeps."""
    world = World([request("a", 8, n=2), request("b", 6, start=50)], slabs=2).all_live()
    assert world.alive() == ["a0", "a1", "b0"]
    while not world.tally.preempted_rows:
        world.decode()
    assert world.waiting() == ["a1"]
    length = len(world.queue.first().context)  # type: ignore[union-attr]
    assert world.tally.recomputed_tokens == length - 1 - 8


def test_rows_beyond_the_oldest_get_no_page() -> None:
    world = World([request(name, 7, start=10 * i) for i, name in enumerate("abc")]).all_live()
    before = [len(world.live.pages(slot)) for slot in world.live.active.tolist()]
    for _ in range(5):
        world.decode(most=1)
    assert [len(world.live.pages(slot)) for slot in world.live.active.tolist()] == [before[0] + 1, *before[1:]]
    assert world.live.generated[world.live.active].tolist() == [6, 1, 1]


# -- giving memory back ----------------------------------------------------------------------------------


def test_rows_that_have_ended_make_way_for_those_that_go_on() -> None:
    world = World([request("a", 5), request("b", 5, start=20), request("c", 5, start=40)]).all_live()
    world.ended = world.live.active[:1].tolist()
    world.running.preempt_beyond(2)
    assert (world.alive(), world.waiting(), world.tally.preempted_rows) == (["b0", "c0"], [], 0)
    world.running.preempt_beyond(1)
    assert (world.alive(), world.waiting(), world.tally.preempted_rows) == (["b0"], ["c0"], 1)


def test_a_row_keeps_its_pages_until_its_last_token_is_here() -> None:
    world = World([Request("a", list(range(5)), SamplingParams(max_new_tokens=2, ignore_eos=True)), request("b", 7)])
    slot, other = world.all_live().live.active.tolist()
    world.running.make_room(None)
    world.live.advance(world.live.active, torch.tensor([1, 2]))
    assert (world.live.active.tolist(), world.live.held.tolist()) == ([other], [slot, other])
    assert world.running.alive == 1
    world.pool.check_integrity(world.running.held_pages())
    packed = world.running.packed(world.live.active, [])
    assert packed is not None
    assert (packed.tokens.tolist(), packed.starts.tolist()) == ([2], [8])
    world.running.leave(slot)
    world.pool.check_integrity(world.running.held_pages())
    world.running.close()
    assert world.pool.used_pages == 0


def test_a_row_whose_last_token_is_not_here_cannot_be_preempted() -> None:
    world = World([request("a", 5)]).all_live()
    world.running.make_room(None)
    world.live.advance(world.live.active, torch.tensor([1]))
    with pytest.raises(AssertionError):
        world.running.preempt(0)


def test_slabs_are_given_back_without_preempting_while_pages_can_move() -> None:
    world = World([request(name, 12, start=20 * i) for i, name in enumerate("abcdef")]).all_live()
    for slot in world.live.active.tolist()[::2]:
        world.running.leave(slot)
    held, used = world.pool.live_slabs, world.pool.used_pages
    spare = world.pool.free_pages // SLAB_PAGES
    assert spare >= 2
    world.running.shrink(spare * world.pool.slab_bytes)
    world.check()
    assert (world.pool.live_slabs, world.pool.used_pages) == (held - spare, used)
    assert world.alive() == ["b0", "d0", "f0"]
    world.running.shrink(1)  # byte
    world.check()
    assert world.alive() == ["b0", "d0"]
    assert world.waiting() == ["f0"]
    assert world.pool.live_slabs == held - spare - 1
    world.running.shrink(99 * world.pool.slab_bytes)
    world.check()
    assert (world.pool.live_slabs, world.waiting()) == (0, ["b0", "d0", "f0"])
    assert world.all_live().alive() == ["b0", "d0", "f0"]


def test_what_others_want_of_a_gpu_leaves_torch_s_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a neighbour that waits for memory would wait for ever."""
    world = World([request(name, 12, start=20 * i) for i, name in enumerate("abcdef")]).all_live()
    held: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(world.pool.live_slabs))
    before = world.pool.live_slabs
    world.running.shrink(1)
    assert not held, "on a CPU there is none"
    world.pool.device = torch.device("cuda", 0)
    world.running.shrink(0)
    assert not held
    world.running.shrink(2 * world.pool.slab_bytes)
    assert held == [before - 3]


def test_free_slabs_are_given_back_with_no_row_the_worse() -> None:
    world = World([request(name, 12, start=20 * i) for i, name in enumerate("abcdef")]).all_live()
    for slot in world.live.active.tolist()[::2]:
        world.running.leave(slot)
    world.running.drop_free_slabs()
    world.check()
    assert world.alive() == ["b0", "d0", "f0"]
    assert world.pool.live_slabs == -(-world.pool.used_pages // SLAB_PAGES)


def test_pages_of_prefills_move_too() -> None:
    world = World([request("a", 16), request("b", 12, start=50)])
    world.admit(rows=1)
    world.prefill()
    world.admit()
    world.prefill(tokens=7)
    world.running.leave(int(world.live.active[0]))
    world.running.drop_free_slabs()
    world.check()
    assert world.pool.live_slabs == 1
    world.prefill()
    assert world.alive() == ["b0"]


def test_leaving_scrubs_what_nobody_else_holds() -> None:
    world = World([request("a", 10, n=2)]).all_live()
    first, second = world.live.active.tolist()
    own = int(world.live.pages(first)[2])
    shared = world.live.pages(first)[:2].copy()
    world.running.leave(first, scrub=True)
    world.check()
    assert world.read(np.array([own])) == [(0, 0)] * PAGE_SIZE
    world.running.leave(second, scrub=True)
    assert world.read(shared) == [(0, 0)] * 2 * PAGE_SIZE


def test_what_a_prefill_wrote_and_nobody_looked_at_is_scrubbed() -> None:
    """It may be NaN, which no log-probability has shown yet."""
    world = World([request("a", 10)])
    world.admit()
    world.prefill(tokens=7)
    pages = world.running.prefills[0].pages.copy()
    world.running.preempt_youngest()
    assert world.read(pages) == [(0, 0)] * 3 * PAGE_SIZE


def test_closing_drops_everything() -> None:
    world = World([request("a", 10, n=2), request("b", 9, start=50), request("c", 30, start=90)])
    world.admit(rows=2)
    world.prefill()
    world.admit()
    world.prefill(tokens=12)
    assert len(world.live) == 3
    assert len(world.running.prefills) == 1
    world.running.close()
    world.check()
    assert (world.pool.used_pages, world.pool.bytes_held, world.running.alive) == (0, 0, 0)


# -- recurrent states ------------------------------------------------------------------------------------


def test_samples_of_a_prompt_get_a_state_each() -> None:
    world = World([request("a", 10, n=3)], layout=RECURRENT).all_live()
    assert world.pool.used_pages == 2 + 3, "keys and values are shared as ever"
    assert world.pool.states.used_pages == 3
    for _ in range(3):
        world.decode()
    world.running.leave(int(world.live.active[0]))
    world.check()
    assert world.pool.states.used_pages == 2


def test_a_row_that_comes_late_shares_nothing() -> None:
    world = World([request("a", 10, n=2)], layout=RECURRENT)
    world.admit(rows=1)
    world.prefill()
    world.admit(rows=2)
    (prefill,) = world.running.prefills
    assert (prefill.computed, world.pool.used_pages) == (0, 6)
    world.prefill()
    assert world.alive() == ["a0", "a1"]


def test_contexts_are_computed_whole_at_least_one_a_step() -> None:
    world = World([request(name, 9, start=10 * i) for i, name in enumerate("abcd")], layout=RECURRENT)
    world.admit()
    assert [length for _, length in world.running.prefill_parts(4)] == [9]
    assert [length for _, length in world.running.prefill_parts(17)] == [9]
    assert [length for _, length in world.running.prefill_parts(18)] == [9, 9]
    world.prefill(4)
    assert world.alive() == ["a0"]


def test_room_that_states_have_to_spare_serves_keys_and_values() -> None:
    """Short rows take all memory, half of it for states; then one of them grows into all but its own state's slab."""
    world = World([request(name, 1, start=i) for i, name in enumerate("abcdefghijklmnop")], slabs=5, layout=RECURRENT)
    world.all_live()
    assert world.memory is not None
    assert world.pool.states.live_slabs > 1
    while len(world.live) > 1 or world.pool.live_slabs < 4:
        assert len(world.live), "the oldest row goes on"
        world.decode()
        world.memory.read()
    assert world.pool.states.live_slabs == 1
    assert world.alive() == ["a0"]


def test_a_step_tells_where_states_are() -> None:
    world = World([request("a", 5, n=2), request("b", 3, n=2, start=20)], layout=RECURRENT)
    world.admit(rows=2)
    world.prefill()
    world.admit()
    world.running.make_room(None)
    packed = world.running.packed(world.live.active, world.running.prefill_parts(ALL))
    assert packed is not None
    states = [*world.live.states[world.live.active].ravel(), *world.running.prefills[0].states]
    assert packed.states.tolist() == states[:3], "a prompt's is computed for its first sample"
    assert len(set(states)) == 4


# -- all together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAYOUT, RECURRENT])
@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_keeps_every_row_and_page(seed: int, layout: KVLayout) -> None:
    """Every operation checks all pages and what is in them; see `World.check`."""
    print("seed", seed)
    rng = random.Random(seed)
    requests = [request(chr(97 + i), rng.randint(1, 25), rng.randint(1, 4), start=30 * i) for i in range(8)]
    requests += [Request(f"{r.row_id}'", r.prompt_ids, r.params) for r in requests[-1:]]
    world = World(requests, slabs=rng.randint(12, 20), layout=layout)
    assert world.memory is not None
    total = sum(r.params.n for r in requests)
    left = 0
    for _ in range(120):
        operation = rng.choice(
            ["admit", "admit", "prefill", "prefill", "decode", "leave", "preempt", "shrink", "squeeze"]
        )
        if operation == "admit":
            world.admit(rng.randint(1, 12), rng.randint(1, 40))
        elif operation == "prefill":
            world.prefill(rng.randint(1, 30))
        elif operation == "decode":
            for _ in range(rng.randint(1, 4)):
                world.decode()
        elif operation == "leave" and len(world.live) and rng.random() < 0.5:
            world.running.leave(rng.choice(world.live.active.tolist()), scrub=rng.random() < 0.5)
            left += 1
        elif operation == "preempt":
            world.running.preempt_beyond(max(0, world.running.alive - rng.randint(1, 3)))
        elif operation == "shrink":
            world.running.drop_free_slabs()
        elif operation == "squeeze":
            world.headroom.taken_bytes = rng.choice([0, 0, world.headroom.total_bytes // 2])
            world.memory.read()
            world.running.shrink(world.memory.excess_bytes)
            world.memory.read()
            assert world.memory.excess_bytes == 0
        world.check()
        assert left + world.running.alive + len(world.queue) == total, "no row is lost"
    assert world.tally.preempted_rows > 3
    world.running.close()
    assert world.memory.bytes_held == 0


def test_prefill_wider_than_the_live_page_tables() -> None:
    """The tables of the live rows start narrow; a prompt with more pages must still fit beside them."""
    short, long = [1, 2, 3], list(range(100))
    world = World([Request("0", short, SamplingParams(max_new_tokens=9)), Request("1", long, SamplingParams())])
    world.admit(rows=1)
    world.prefill()
    world.admit()
    running, live = world.running, world.live
    slots, parts = running.make_room(None), running.prefill_parts(ALL)
    pages_of_long = len(long) // PAGE_SIZE
    assert live.tables.shape[1] < pages_of_long
    packed = running.packed(slots, parts)
    assert packed is not None
    assert packed.tables.shape == (2, pages_of_long)
    held = live.pages(int(slots[0]))
    assert packed.tables[0, : len(held)].tolist() == held.tolist()
    assert packed.tables[1].tolist() == parts[0][0].pages.tolist()
