"""Budgets of later turns: what TRL would cut is not generated."""

from __future__ import annotations

from rollout.integrations.trl.turns import Turns


def test_later_turns_have_what_earlier_ones_left() -> None:
    turns = Turns()
    assert turns.left([[1, 2], [3], [3]], limit=10) == [10, 10, 10]
    turns.ended([[7, 7, 7], [8], [8, 9]])
    # The second row goes on no further; a tool said two tokens to each of the others.
    assert turns.left([[1, 2, 7, 7, 7, 5, 5], [3, 8, 9, 5, 5]], limit=10) == [5, 6]
    turns.ended([[4], [4, 4]])
    assert turns.left([[3, 8, 9, 5, 5, 4, 4, 5, 5, 5, 5]], limit=10) == [1]


def test_rows_that_are_not_known_have_the_whole_budget() -> None:
    turns = Turns()
    turns.left([[1], [2]], limit=6)
    turns.ended([[7], [7]])
    assert turns.left([[9, 9], [2, 7, 5]], limit=6) == [6, 6]
    turns.restart()
    assert turns.left([[2, 7, 5]], limit=6) == [6]
