"""Keys of the noise: no two rows of a run share one, and a resumed run finds its own again."""

from __future__ import annotations

from rollout.integrations.trl.call_keys import CallKeys, Mode


def _run(steps: range, ranks: int = 1, turns: int = 2, generations: int = 2) -> list[str]:
    """Return the keys of three rows for each turn of each generation of each step."""
    found = []
    for rank in range(ranks):
        keys = CallKeys()
        for step in steps:
            for _ in range(generations):
                keys.begin_generation("train", step)
                for _ in range(turns):
                    found += keys.next_turn(rank, 3)
    return found


def test_no_two_rows_share_a_key() -> None:
    keys = _run(range(4), ranks=3)
    assert len(set(keys)) == len(keys) == 4 * 3 * 2 * 2 * 3


def test_a_resumed_run_goes_on_with_the_same_keys() -> None:
    assert _run(range(4))[-12:] == _run(range(3, 4))


def test_training_again_begins_again() -> None:
    keys = CallKeys()
    first = _turn(keys, "train", 0)
    assert _turn(keys, "train", 0) != first
    keys.restart("train")
    assert _turn(keys, "train", 0) == first


def test_evaluations_take_no_keys_of_training() -> None:
    keys = CallKeys()
    first = _turn(keys, "train", 2)
    keys.restart("eval")
    evaluated = _turn(keys, "eval", 2)
    second = _turn(keys, "train", 2)
    assert not {*evaluated} & {*first, *second}
    assert second == _run(range(2, 3), turns=1)[3:]


def _turn(keys: CallKeys, mode: Mode, step: int) -> list[str]:
    keys.begin_generation(mode, step)
    return keys.next_turn(0, 3)
