"""Rows that release pages: preempted for other rows or for returned slabs, or finished."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout.requests import Request
from rollout.sampling_params import SamplingParams
from tests.support.scheduler_world import ALL, PAGE_SIZE, SLAB_PAGES, World, request


def test_youngest_rows_are_preempted_and_keep_their_tokens() -> None:
    world = World([request(name, 5, start=10 * i) for i, name in enumerate("abc")]).all_live()
    for _ in range(3):
        world.decode()
    kept = world.live.completion(int(world.live.active[2])).tokens.tolist()
    world.scheduler.preempt_beyond(1)
    world.check()
    assert (world.alive(), world.waiting()) == (["a0"], ["b0", "c0"])
    assert len(kept) == 4
    world.admit()
    assert [prefill.context.tolist()[5:] for prefill in world.scheduler.prefills] == [
        world.drawn[id(prefill.rows[0])] for prefill in world.scheduler.prefills
    ]
    assert world.scheduler.prefills[1].context.tolist() == [20, 21, 22, 23, 24, *kept]
    world.prefill()
    world.decode()
    assert world.alive() == ["a0", "b0", "c0"]
    assert world.live.completion(int(world.live.active[2])).tokens.tolist()[:4] == kept
    assert world.tally.preempted_rows == 2
    assert world.tally.recomputed_tokens == 2 * (5 + 3)


def test_prefills_are_preempted_before_decoding_rows() -> None:
    world = World([request("a", 5), request("b", 9, n=2, start=50)])
    world.admit(rows=1)
    world.prefill()
    world.admit()
    world.prefill(tokens=6)
    assert world.scheduler.preempt_youngest()
    world.check()
    assert (world.waiting(), len(world.scheduler.prefills)) == (["b1"], 1)
    assert world.tally.recomputed_tokens == 0
    assert world.scheduler.preempt_youngest()
    world.check()
    assert (world.waiting(), len(world.scheduler.prefills)) == (["b0", "b1"], 0)
    assert world.tally.recomputed_tokens == 6
    assert world.scheduler.preempt_youngest()
    assert world.waiting() == ["a0", "b0", "b1"]
    assert not world.scheduler.preempt_youngest()
    assert (world.used_pages, world.tally.preempted_rows) == (0, 3)
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
    assert world.memory is not None
    while world.memory.attainable_pages > world.memory.used_pages:
        world.decode()
    assert world.alive() == ["a0"]
    for _ in range(PAGE_SIZE):
        world.decode()
    assert world.waiting() == ["a0", "b0", "c0"], "a row that outgrew memory alone goes back too"


def test_row_with_the_cheapest_recomputation_is_preempted() -> None:
    """Here that is not the youngest row, but a sample whose prompt pages another sample keeps."""
    world = World([request("a", 8, n=2), request("b", 6, start=50)], slabs=2).all_live()
    assert world.alive() == ["a0", "a1", "b0"]
    while not world.tally.preempted_rows:
        world.decode()
    assert world.waiting() == ["a1"]
    length = len(world.queue.row(0).context)  # type: ignore[union-attr]
    assert world.tally.recomputed_tokens == length - 1 - 8


def test_rows_beyond_the_oldest_get_no_page() -> None:
    world = World([request(name, 7, start=10 * i) for i, name in enumerate("abc")]).all_live()
    before = [len(world.live.pages(slot)) for slot in world.live.active.tolist()]
    for _ in range(5):
        world.decode(most=1)
    assert [len(world.live.pages(slot)) for slot in world.live.active.tolist()] == [before[0] + 1, *before[1:]]
    assert world.live.generated[world.live.active].tolist() == [6, 1, 1]


def test_ended_rows_are_released_before_others_are_preempted() -> None:
    world = World([request("a", 5), request("b", 5, start=20), request("c", 5, start=40)]).all_live()
    world.ended = world.live.active[:1].tolist()
    world.scheduler.preempt_beyond(2)
    assert (world.alive(), world.waiting(), world.tally.preempted_rows) == (["b0", "c0"], [], 0)
    world.scheduler.preempt_beyond(1)
    assert (world.alive(), world.waiting(), world.tally.preempted_rows) == (["b0"], ["c0"], 1)


def test_row_keeps_its_pages_until_its_last_token_is_read() -> None:
    world = World(
        [Request("a", list(range(5)), SamplingParams(max_new_tokens=2, ignore_eos=True)), request("b", 7, start=50)]
    )
    slot, other = world.all_live().live.active.tolist()
    world.scheduler.make_room(None)
    world.live.advance(world.live.active, torch.tensor([1, 2]))
    assert (world.live.active.tolist(), world.live.occupied.tolist()) == ([other], [slot, other])
    assert world.scheduler.alive == 1
    world.pool.check_integrity(world.scheduler.held_pages())
    packed = world.forward_batch(world.live.active, [])
    assert packed is not None
    assert (packed.tokens.tolist(), packed.prefix_lens.tolist()) == ([2], [8])
    world.scheduler.leave(slot)
    world.pool.check_integrity(world.scheduler.held_pages())
    world.scheduler.close()
    assert world.used_pages == 0


def test_row_with_an_unread_last_token_cannot_be_preempted() -> None:
    world = World([request("a", 5)]).all_live()
    world.scheduler.make_room(None)
    world.live.advance(world.live.active, torch.tensor([1]))
    with pytest.raises(AssertionError):
        world.scheduler.preempt(0)


def test_slabs_are_given_back_without_preempting_while_pages_can_move() -> None:
    world = World([request(name, 12, start=20 * i) for i, name in enumerate("abcdef")]).all_live()
    for slot in world.live.active.tolist()[::2]:
        world.scheduler.leave(slot)
    held, used = world.pool.live_slabs, world.used_pages
    spare = world.pool.live_slabs - -(-used // SLAB_PAGES)
    assert spare >= 2
    world.scheduler.shrink(spare * world.pool.slab_bytes)
    world.check()
    assert (world.pool.live_slabs, world.used_pages) == (held - spare, used)
    assert world.alive() == ["b0", "d0", "f0"]
    world.scheduler.shrink(1)  # byte
    world.check()
    assert world.alive() == ["b0", "d0"]
    assert world.waiting() == ["f0"]
    assert world.pool.live_slabs == held - spare - 1
    world.scheduler.shrink(99 * world.pool.slab_bytes)
    world.check()
    assert (world.pool.live_slabs, world.waiting()) == (0, ["b0", "d0", "f0"])
    assert world.all_live().alive() == ["b0", "d0", "f0"]


def test_released_slabs_leave_torch_s_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise another process that needs the memory would wait for ever."""
    world = World([request(name, 12, start=20 * i) for i, name in enumerate("abcdef")]).all_live()
    held: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(world.pool.live_slabs))
    before = world.pool.live_slabs
    world.scheduler.shrink(1)
    assert not held, "on a CPU there is none"
    world.pool.device = torch.device("cuda", 0)
    world.scheduler.shrink(0)
    assert not held
    world.scheduler.shrink(2 * world.pool.slab_bytes)
    assert held == [before - 3]


def test_free_slabs_are_returned_without_preemption() -> None:
    world = World([request(name, 12, start=20 * i) for i, name in enumerate("abcdef")]).all_live()
    for slot in world.live.active.tolist()[::2]:
        world.scheduler.leave(slot)
    assert world.memory is not None
    world.memory.cache.evict(ALL)
    world.scheduler.drop_free_slabs()
    world.check()
    assert world.alive() == ["b0", "d0", "f0"]
    assert world.pool.live_slabs == -(-world.used_pages // SLAB_PAGES)


def test_pages_of_prefills_move_too() -> None:
    world = World([request("a", 16), request("b", 12, start=50)])
    world.admit(rows=1)
    world.prefill()
    world.admit()
    world.prefill(tokens=7)
    world.scheduler.leave(int(world.live.active[0]))
    assert world.memory is not None
    world.memory.cache.evict(ALL)
    world.scheduler.drop_free_slabs()
    world.check()
    assert world.pool.live_slabs == 1
    world.prefill()
    assert world.alive() == ["b0"]


def test_released_pages_without_holders_are_zeroed() -> None:
    world = World([request("a", 10, n=2)]).all_live()
    first, second = world.live.active.tolist()
    own = int(world.live.pages(first)[2])
    shared = world.live.pages(first)[:2].copy()
    world.scheduler.leave(first, scrub=True)
    world.check()
    assert world.read(np.array([own])) == [(0, 0)] * PAGE_SIZE
    world.scheduler.leave(second, scrub=True)
    assert world.read(shared) == [(0, 0)] * 2 * PAGE_SIZE


def test_pages_of_an_unread_prefill_are_zeroed() -> None:
    """They may hold NaN, which no log-probability has shown yet."""
    world = World([request("a", 10)])
    world.admit()
    world.prefill(tokens=7)
    pages = world.scheduler.prefills[0].pages.copy()
    world.scheduler.preempt_youngest()
    assert world.read(pages) == [(0, 0)] * 3 * PAGE_SIZE


def test_closing_drops_everything() -> None:
    world = World([request("a", 10, n=2), request("b", 9, start=50), request("c", 30, start=90)])
    world.admit(rows=2)
    world.prefill()
    world.admit()
    world.prefill(tokens=12)
    assert len(world.live) == 3
    assert len(world.scheduler.prefills) == 1
    world.scheduler.close()
    world.check()
    assert (world.used_pages, world.pool.bytes_held, world.scheduler.alive) == (0, 0, 0)
