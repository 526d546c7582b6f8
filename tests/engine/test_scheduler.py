"""Rows and their pages: sharing, forking, preemption, readmission; every page keeps its contents."""

from __future__ import annotations

import random

import pytest

from rollout.models.kv_cache.layout import KVLayout
from rollout.requests import Request
from rollout.sampling_params import SamplingParams
from tests.support.scheduler_world import ALL, LAYOUT, PAGE_SIZE, RECURRENT, World, request

# -- sharing ---------------------------------------------------------------------------------------------


def test_samples_of_a_prompt_share_its_full_pages_and_copy_the_last() -> None:
    world = World([request("a", 10, n=4)]).all_live()
    pages = world.live.all_pages()
    assert world.alive() == ["a0", "a1", "a2", "a3"]
    assert {tuple(own[:2].tolist()) for own in pages} == {tuple(pages[0][:2].tolist())}
    assert len({int(own[2]) for own in pages}) == 4
    assert world.used_pages == 2 + 4
    for _ in range(9):
        world.decode()


def test_a_prompt_of_whole_pages_has_nothing_to_copy() -> None:
    world = World([request("a", 8, n=3)]).all_live()
    assert world.used_pages == 2
    world.decode()
    assert world.used_pages == 2 + 3


def test_a_prompt_shorter_than_a_page_is_copied_whole() -> None:
    world = World([request("a", 3, n=3)]).all_live()
    assert world.used_pages == 3
    world.decode()
    world.decode()
    assert world.used_pages == 6


def test_the_prompt_of_a_group_is_computed_once() -> None:
    world = World([request("a", 10, n=3), request("b", 10), request("c", 10, start=50)])
    world.admit()
    assert [len(prefill.rows) for prefill in world.scheduler.prefills] == [4, 1]
    assert sum(length for _, length in world.scheduler.prefill_chunks(ALL)) == 20
    world.prefill()
    assert world.alive() == ["a0", "a1", "a2", "b0", "c0"]


def test_rows_join_a_prefill_that_is_under_way() -> None:
    world = World([request("a", 10, n=2)])
    world.admit(rows=1)
    world.prefill(tokens=6)
    assert world.scheduler.prefills[0].computed == 6
    world.admit(rows=2, tokens=6)
    assert [len(prefill.rows) for prefill in world.scheduler.prefills] == [2]
    world.prefill(tokens=6)
    assert world.alive() == ["a0", "a1"]


@pytest.mark.parametrize(("tokens", "used"), [(10, 4), (8, 3), (3, 2), (12, 4)])
def test_rows_that_come_late_share_full_pages_and_copy_the_next(tokens: int, used: int) -> None:
    """Compute the last token alone, whose logits are needed."""
    world = World([request("a", tokens, n=2)])
    world.admit(rows=1)
    world.prefill()
    world.admit(rows=2)
    (prefill,) = world.scheduler.prefills
    assert (prefill.computed, prefill.remaining) == (tokens - 1, 1)
    world.prefill()
    assert world.used_pages == used
    assert world.alive() == ["a0", "a1"]


def test_pages_of_a_prompt_outlive_the_row_that_computed_them() -> None:
    world = World([request("a", 10, n=3)])
    world.admit(rows=2)
    world.prefill()
    world.scheduler.leave(int(world.live.active[0]))
    world.check()
    world.admit(rows=2)
    assert world.scheduler.prefills[0].computed == 9
    world.scheduler.leave(int(world.live.active[0]))
    world.check()
    world.prefill()
    assert world.alive() == ["a2"]
    assert world.used_pages == 3
    world.scheduler.leave(int(world.live.active[0]))
    world.check()
    assert world.used_pages == 0


def test_two_prefills_of_one_prompt_do_not_free_each_other_s_pages() -> None:
    """A preempted row recomputes its prompt while a new sample of that prompt computes it for the first time."""
    world = World([request("a", 10, n=3)])
    world.admit(rows=1)
    world.prefill()
    world.decode()
    world.scheduler.preempt(int(world.live.active[0]))
    assert world.waiting() == ["a0", "a1", "a2"]
    world.admit(rows=3)
    assert [len(prefill.rows) for prefill in world.scheduler.prefills] == [1, 2]
    world.prefill()
    assert world.alive() == ["a0", "a1", "a2"]
    for slot in world.live.active.tolist():
        world.decode()
        world.scheduler.leave(slot)
        world.check()
    assert world.used_pages == 0


# -- admitting -------------------------------------------------------------------------------------------


def test_rows_are_admitted_in_order_up_to_the_target() -> None:
    world = World([request(name, 5, start=10 * i) for i, name in enumerate("abcd")])
    world.admit(rows=3)
    assert (world.scheduler.alive, world.waiting()) == (3, ["d0"])
    world.admit(rows=2)
    assert world.scheduler.alive == 3
    world.prefill()
    assert world.alive() == ["a0", "b0", "c0"]


def test_admission_stops_when_prefill_tokens_are_used_up() -> None:
    world = World([request(name, 5, start=10 * i) for i, name in enumerate("abcd")])
    world.admit(tokens=6)
    assert world.waiting() == ["c0", "d0"], "the second still begins within six tokens"
    world.admit(tokens=6)
    assert world.waiting() == ["c0", "d0"]
    assert [length for _, length in world.scheduler.prefill_chunks(6)] == [5, 1]
    world.prefill(tokens=6)
    world.admit(tokens=6)
    assert world.waiting() == ["d0"]


def test_prefill_goes_on_oldest_first_in_parts() -> None:
    world = World([request("a", 9), request("b", 6, start=20)])
    world.admit()
    seen = []
    while world.scheduler.prefills:
        parts = world.scheduler.prefill_chunks(4)
        seen.append([(p.rows[0].request.row_id, p.computed, length) for p, length in parts])
        world.prefill(4)
    assert seen == [[("a", 0, 4)], [("a", 4, 4)], [("a", 8, 1), ("b", 0, 3)], [("b", 3, 3)]]


def test_a_step_packs_the_last_token_of_each_live_row_and_then_the_parts_of_prefills() -> None:
    world = World([request("a", 5), request("b", 9, start=20), request("c", 6, start=40)])
    assert world.forward_batch(world.live.active, []) is None
    world.admit(rows=1)
    world.prefill()
    world.decode()
    world.admit()
    world.prefill(3)
    world.scheduler.make_room(None)
    parts = world.scheduler.prefill_chunks(8)
    packed = world.forward_batch(world.live.active, parts)
    assert packed is not None
    a, (b, c) = world.live.pages(0), (prefill.pages for prefill in world.scheduler.prefills)
    assert packed.prefix_lens.tolist() == [6, 3, 0]
    assert packed.query_lens.tolist() == [1, 6, 2]
    assert packed.tokens.tolist() == [*world.live.last_tokens(world.live.active).tolist(), *range(23, 29), 40, 41]
    assert packed.positions.tolist() == [6, 3, 4, 5, 6, 7, 8, 0, 1]
    size = PAGE_SIZE
    wanted = [(a, 6), *((b, i) for i in range(3, 9)), (c, 0), (c, 1)]
    assert packed.slot_mapping(size).tolist() == [pages[i // size] * size + i % size for pages, i in wanted]
    assert packed.page_tables.shape == (3, 3)


def test_missing_pages_are_reported_only_on_an_empty_device() -> None:
    world = World([request("a", 5), request("b", 40, start=50)], slabs=2)
    assert world.admit() is None
    assert world.waiting() == ["b0"]
    world.prefill()
    assert world.admit() is None
    world.scheduler.leave(int(world.live.active[0]))
    assert world.admit() == 11, "ten pages, and one for its first token"
    assert world.used_pages == 0


def test_row_is_admitted_only_with_room_for_one_token() -> None:
    world = World([request("a", 32)], slabs=2)
    assert world.admit() == 9
    world = World([request("a", 31)], slabs=2).all_live()
    world.decode()
    assert world.tally.preempted_rows == 0
    world.decode()
    assert world.tally.preempted_rows == 1


@pytest.mark.parametrize(("tokens", "fits"), [(683, True), (684, False)])
def test_admission_leaves_room_for_what_live_rows_add(tokens: int, fits: bool) -> None:
    """25 of 200 pages are used and four reserved; a row needs room for its prompt and one token."""
    world = World([request("a", 97), request("b", tokens, start=1000)])
    world.admit(rows=1)
    world.prefill()
    world.admit()
    assert (world.waiting() == []) == fits


@pytest.mark.parametrize("layout", [LAYOUT, RECURRENT])
def test_fork_without_pages_waits(layout: KVLayout) -> None:
    """Pages were free at admission, and other rows took them since."""
    world = World([request("a", 6, n=6)], slabs=3, layout=layout)
    world.admit(rows=6)
    assert len(world.scheduler.prefills[0].rows) == 6
    taken = world.pool.allocate(world.pool.free_pages - 2)
    world.headroom.taken_bytes = 10**9
    assert world.memory is not None
    world.memory.read_headroom()
    extra = world.scheduler.held_pages
    world.scheduler.held_pages = lambda: [*extra(), taken]  # type: ignore[method-assign]
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


# -- all together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAYOUT, RECURRENT])
@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_keeps_every_row_and_page(seed: int, layout: KVLayout) -> None:
    """Each operation checks all pages and their contents; see `World.check`."""
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
            world.scheduler.leave(rng.choice(world.live.active.tolist()), scrub=rng.random() < 0.5)
            left += 1
        elif operation == "preempt":
            world.scheduler.preempt_beyond(max(0, world.scheduler.alive - rng.randint(1, 3)))
        elif operation == "shrink":
            world.scheduler.drop_free_slabs()
        elif operation == "squeeze":
            world.headroom.taken_bytes = rng.choice([0, 0, world.headroom.total_bytes // 2])
            world.memory.read_headroom()
            world.scheduler.shrink(world.memory.excess_bytes)
            world.memory.read_headroom()
            assert world.memory.excess_bytes == 0
        world.check()
        assert left + world.scheduler.alive + len(world.queue) == total, "no row is lost"
    assert world.tally.preempted_rows > 3
    world.scheduler.close()
    assert world.memory.bytes_held == 0


def test_prefill_wider_than_the_live_page_tables() -> None:
    """The tables of the live rows start narrow; a prompt with more pages must still fit beside them."""
    short, long = [1, 2, 3], list(range(100))
    world = World([Request("0", short, SamplingParams(max_new_tokens=9)), Request("1", long, SamplingParams())])
    world.admit(rows=1)
    world.prefill()
    world.admit()
    scheduler, live = world.scheduler, world.live
    slots, parts = scheduler.make_room(None), scheduler.prefill_chunks(ALL)
    pages_of_long = len(long) // PAGE_SIZE
    assert live.page_tables.shape[1] < pages_of_long
    packed = world.forward_batch(slots, parts)
    assert packed is not None
    assert packed.page_tables.shape == (2, pages_of_long)
    held = live.pages(int(slots[0]))
    assert packed.page_tables[0, : len(held)].tolist() == held.tolist()
    assert packed.page_tables[1].tolist() == parts[0][0].pages.tolist()
