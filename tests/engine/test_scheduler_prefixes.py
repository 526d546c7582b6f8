"""Prompts that begin alike: the first is computed, the others wait for it and share its pages."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from rollout.requests import Request
from rollout.sampling_params import SamplingParams
from tests.support.scheduler_world import ALL, LAYOUT, PAGE_SIZE, RECURRENT, World


def prompt(name: str, ids: list[int], n: int = 1) -> Request:
    return Request(name, ids, SamplingParams(n=n, max_new_tokens=500))


def alike(count: int, common: int, own: int) -> list[Request]:
    """Prompts that have ``common`` tokens in common and ``own`` of their own."""
    return [
        prompt(chr(ord("a") + i), [*range(common), *range(1000 * (i + 1), 1000 * (i + 1) + own)]) for i in range(count)
    ]


def computed(world: World) -> dict[str, int]:
    """Tokens at the beginning of each prefill that it did not have to compute itself."""
    return {p.rows[0].request.row_id: p.computed for p in world.scheduler.prefills}


# -- waiting for each other ------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [1, 3, 4, 5])
@pytest.mark.parametrize("common", [4, 5, 7, 8, 9, 40])
def test_the_common_beginning_is_computed_once(common: int, own: int) -> None:
    world = World([*alike(3, common, own), prompt("x", [7, 7, 7, 7, 7])])
    world.admit()
    assert computed(world) == {"a": 0, "x": 0}, "those that begin alike wait, and let others pass"
    world.admit()
    assert list(computed(world)) == ["a", "x"]
    world.prefill()
    world.admit()
    # Of a prompt that ends within the common beginning's last page, that page may serve as it is.
    assert computed(world) == dict.fromkeys("bc", common)
    world.prefill()
    assert sorted(world.alive()) == ["a0", "b0", "c0", "x0"]
    for _ in range(2 * PAGE_SIZE):
        world.decode()
    assert (world.tally.prefix_hits, world.tally.reused_tokens) == (2, 2 * common)
    assert world.tally.pages_saved == 2 * (common // PAGE_SIZE)


def test_prompts_without_a_full_page_in_common_do_not_wait() -> None:
    world = World(alike(3, 3, 20))
    world.admit()
    assert list(computed(world)) == ["a", "b", "c"]


def test_a_prompt_may_be_the_beginning_of_another() -> None:
    for longer_first in (False, True):
        requests = [prompt("a", list(range(8))), prompt("b", list(range(13)))]
        world = World(requests[::-1] if longer_first else requests)
        world.admit()
        assert len(world.scheduler.prefills) == 1
        world.prefill()
        world.admit()
        # Of the prompt that is known as a whole, the last token is computed: its logits are needed.
        assert computed(world) == ({"a": 7} if longer_first else {"b": 8})
        world.prefill()
        assert len(world.alive()) == 2


def test_rows_start_as_soon_as_the_pages_that_they_share_are_computed() -> None:
    world = World(alike(2, 8, 40))
    world.admit()
    world.prefill(tokens=7)
    world.admit()
    assert computed(world) == {"a": 7}
    world.prefill(tokens=1)
    world.admit()
    assert computed(world) == {"a": 8, "b": 8}, "the first is still being computed"
    world.prefill(tokens=17)
    world.prefill()
    assert world.alive() == ["a0", "b0"]


def test_turns_of_a_conversation_are_computed_one_after_the_other() -> None:
    text = list(range(100))
    world = World([prompt(name, text[:length]) for name, length in (("a", 20), ("b", 50), ("c", 81))])
    reused = []
    for _ in range(3):
        world.admit()
        reused.append(computed(world))
        world.prefill()
    assert reused == [{"a": 0}, {"b": 20}, {"c": 50}]


def test_samples_join_the_prefill_that_others_wait_for() -> None:
    world = World([prompt("a", list(range(12)), n=2), prompt("b", [*range(12), 90, 91], n=3)])
    world.admit()
    assert [len(prefill.rows) for prefill in world.scheduler.prefills] == [2]
    world.prefill()
    world.admit()
    assert [(p.computed, len(p.rows)) for p in world.scheduler.prefills] == [(12, 3)]
    world.prefill()
    assert world.alive() == ["a0", "a1", "b0", "b1", "b2"]


def test_only_so_many_rows_are_passed() -> None:
    world = World([*alike(2, 8, 4), *([prompt("z", list(range(13)), n=400)]), prompt("x", [5, 5, 5, 5, 5])])
    world.admit()
    assert computed(world) == {"a": 0}
    world.prefill()
    world.admit(rows=3)
    assert list(computed(world)) == ["b", "z"]


def test_recurrent_models_share_nothing_and_wait_for_nobody() -> None:
    world = World(alike(3, 12, 4), layout=RECURRENT)
    world.admit()
    assert computed(world) == {"a": 0, "b": 0, "c": 0}
    world.prefill()
    assert world.tally.prefix_hits == 0


# -- when the first leaves -------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 3, 4, 9])
def test_another_takes_over_when_the_first_is_preempted(tokens: int) -> None:
    world = World(alike(3, 12, 4))
    world.admit()
    if tokens:
        world.prefill(tokens=tokens)
    assert world.scheduler.preempt_youngest()
    world.check()
    assert world.waiting() == ["a0", "b0", "c0"]
    world.admit(rows=1)
    assert list(computed(world)) == ["a"]
    assert world.all_ends() == ["a0", "b0", "c0"]


@pytest.mark.parametrize("tokens", [0, 3, 4, 9])
def test_another_takes_over_when_the_first_is_withdrawn(tokens: int) -> None:
    world = World(alike(3, 12, 4))
    world.admit()
    if tokens:
        world.prefill(tokens=tokens)
    assert [row.request.row_id for row in world.scheduler.withdraw(lambda row: row.request.row_id == "a")] == ["a"]
    world.check()
    world.admit()
    assert computed(world) == {"b": 0}
    assert world.all_ends() == ["b0", "c0"]


def test_pages_in_use_by_others_outlive_a_prefill_that_is_given_up() -> None:
    world = World(alike(2, 8, 40))
    world.admit()
    world.prefill(tokens=10)
    world.admit()
    assert computed(world) == {"a": 10, "b": 8}
    world.scheduler.withdraw(lambda row: row.request.row_id == "a")
    world.check()
    world.prefill()
    assert world.alive() == ["b0"]


def test_pages_of_a_row_whose_numbers_are_not_finite_are_not_shared() -> None:
    world = World(alike(2, 8, 5))
    world.admit(rows=1)
    world.prefill()
    world.scheduler.leave(int(world.live.active[0]), scrub=True)
    world.check()
    world.admit()
    assert computed(world) == {"b": 0}
    assert world.memory is not None
    assert len(world.memory.cache) == 13 // PAGE_SIZE


def test_prompts_on_two_sides_of_the_longrope_boundary_neither_share_nor_wait() -> None:

    world = World([prompt("a", list(range(20))), prompt("b", [*range(12), 90])], layout=replace(LAYOUT, boundary=16))
    world.admit()
    assert computed(world) == {"a": 0, "b": 0}
    assert world.all_ends() == ["a0", "b0"]


@pytest.mark.parametrize("decodes_apart", [False, True])
def test_a_row_that_crosses_the_longrope_boundary_takes_no_pages_of_its_shorter_self(decodes_apart: bool) -> None:
    layout = replace(LAYOUT, boundary=16, decodes_apart=decodes_apart)
    world = World([prompt("a", list(range(12)))], layout=layout)
    world.admit()
    world.prefill()
    while not world.tally.preempted_rows:
        world.decode()
        world.admit()
    assert len(world.scheduler.prefills[0].context) == 17
    assert computed(world) == {"a": 0}


# -- memory ----------------------------------------------------------------------------------------------


def test_pages_that_waiting_rows_need_outlive_rows_and_go_before_any_row() -> None:
    world = World([*alike(3, 16, 4), prompt("x", list(range(500, 520)))], slabs=3)
    world.admit(rows=1)
    world.prefill()
    world.scheduler.leave(int(world.live.active[0]))
    world.check()
    assert world.memory is not None
    assert (world.used_pages, len(world.memory.cache)) == (0, 5)
    world.admit(rows=1)
    assert computed(world) == {"b": 16}
    world.prefill()
    world.scheduler.leave(int(world.live.active[0]))
    world.queue.withdraw(lambda row: row.request.row_id == "c")
    world.admit()
    world.prefill()
    for _ in range(28):  # to the end of memory
        world.decode()
    assert world.tally.preempted_rows == 0
    assert world.alive() == ["x0"]


def test_the_pool_does_not_grow_for_pages_that_nobody_needs() -> None:
    requests = [prompt(str(i), list(range(100 * i, 100 * i + 13))) for i in range(20)]
    world = World(requests)
    for _ in requests:
        world.admit(rows=1)
        world.prefill()
        world.scheduler.leave(int(world.live.active[0]))
    assert world.pool.live_slabs == 1


def test_the_prefix_that_fewer_rows_need_goes_first() -> None:
    first = [prompt(f"a{i}", [*range(8), 100 + i, 1]) for i in range(4)]
    second = [prompt(f"b{i}", [*range(50, 58), 100 + i, 1]) for i in range(2)]
    world = World([first[0], second[0], *first[1:], *second[1:]])
    world.admit()
    world.prefill()
    for slot in world.live.active.tolist():
        world.scheduler.leave(slot)
    assert world.memory is not None
    cache = world.memory.cache
    cache.evict(cache.evictable_pages - 2)
    world.check()
    assert cache.match(np.array([*range(8), 9])).tokens == 8
    assert cache.match(np.array([*range(50, 58), 9])).tokens == 0


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_keeps_every_row_and_page(seed: int) -> None:
    """Chunks, caps, preemption, withdrawal, too little memory and lost slabs, over prompts that begin alike."""
    rng = random.Random(seed)
    texts = [[rng.randrange(3) for _ in range(60)] for _ in range(3)]
    requests = []
    for i in range(40):
        text = rng.choice(texts)
        ids = [
            *text[: rng.choice([0, 3, 4, 5, 8, 16, 31, 32, 33])],
            *(rng.randrange(3) for _ in range(rng.randint(1, 9))),
        ]
        requests.append(prompt(str(i), ids, n=rng.choice([1, 1, 3])))
    total = sum(request.params.n for request in requests)
    world = World(requests, slabs=rng.choice([8, 12, 40]))
    ended = 0
    for _ in range(4000):
        match rng.randrange(12):
            case 0:
                world.scheduler.preempt_beyond(rng.randint(0, max(0, world.scheduler.alive)))
            case 1:
                world.scheduler.shrink(rng.randint(1, 3) * world.pool.slab_bytes)
            case 2 if len(world.live):
                slot = int(rng.choice(world.live.active.tolist()))
                world.scheduler.leave(slot, scrub=rng.random() < 0.2)
                ended += 1
            case 3:
                gone = str(rng.randrange(40))
                unwanted = [*world.scheduler.withdraw(lambda row, gone=gone: row.request.row_id == gone)]
                unwanted += world.queue.withdraw(lambda row, gone=gone: row.request.row_id == gone)
                ended += len(unwanted)
            case 4:
                world.decode(rng.choice([None, 1, 3]))
            case 5 | 6:
                world.prefill(rng.choice([1, 3, 5, ALL]))
            case _:
                world.admit(rng.randint(1, 20), rng.choice([1, 10, ALL]))
        world.check()
        waiting = len(world.queue)
        assert waiting + world.scheduler.alive + ended == total
        if not waiting and not world.scheduler.alive:
            break
    else:
        ended += len(world.all_ends())
    assert ended == total
    world.scheduler.close()
    assert world.memory is not None
    assert (world.pool.bytes_held, len(world.memory.cache)) == (0, 0)
