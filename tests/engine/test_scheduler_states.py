"""Rows with recurrent states: each computes its own prompt."""

from __future__ import annotations

from tests.support.scheduler_world import ALL, RECURRENT, World, request


def test_samples_of_a_prompt_get_a_state_each() -> None:
    world = World([request("a", 10, n=3)], layout=RECURRENT).all_live()
    assert world.pool.used_pages == 2 + 3, "keys and values are shared as ever"
    assert world.pool.states.used_pages == 3
    for _ in range(3):
        world.decode()
    world.scheduler.leave(int(world.live.active[0]))
    world.check()
    assert world.pool.states.used_pages == 2


def test_late_row_shares_no_state() -> None:
    world = World([request("a", 10, n=2)], layout=RECURRENT)
    world.admit(rows=1)
    world.prefill()
    world.admit(rows=2)
    (prefill,) = world.scheduler.prefills
    assert (prefill.computed, world.pool.used_pages) == (0, 6)
    world.prefill()
    assert world.alive() == ["a0", "a1"]


def test_contexts_are_computed_whole_at_least_one_a_step() -> None:
    world = World([request(name, 9, start=10 * i) for i, name in enumerate("abcd")], layout=RECURRENT)
    world.admit()
    assert [length for _, length in world.scheduler.prefill_chunks(4)] == [9]
    assert [length for _, length in world.scheduler.prefill_chunks(17)] == [9]
    assert [length for _, length in world.scheduler.prefill_chunks(18)] == [9, 9]
    world.prefill(4)
    assert world.alive() == ["a0"]


def test_memory_free_of_states_serves_keys_and_values() -> None:
    """Short rows take all memory, half of it for states; then one row grows into all slabs but that of its state."""
    world = World([request(name, 1, start=i) for i, name in enumerate("abcdefghijklmnop")], slabs=5, layout=RECURRENT)
    world.all_live()
    assert world.memory is not None
    assert world.pool.states.live_slabs > 1
    while len(world.live) > 1 or world.pool.live_slabs < 4:
        assert len(world.live), "the oldest row goes on"
        world.decode()
        world.memory.read_headroom()
    assert world.pool.states.live_slabs == 1
    assert world.alive() == ["a0"]


def test_forward_batch_names_the_states_of_its_rows() -> None:
    world = World([request("a", 5, n=2), request("b", 3, n=2, start=20)], layout=RECURRENT)
    world.admit(rows=2)
    world.prefill()
    world.admit()
    world.scheduler.make_room(None)
    packed = world.forward_batch(world.live.active, world.scheduler.prefill_chunks(ALL))
    assert packed is not None
    states = [*world.live.states[world.live.active].ravel(), *world.scheduler.prefills[0].states]
    assert packed.states.tolist() == states[:3], "a prompt's is computed for its first sample"
    assert len(set(states)) == 4
