"""Closing: everything is closed, and the first failure is the one that is raised."""

from __future__ import annotations

import pytest

from rollout.closing import closed_by, do_all


def failing(name: str, done: list[str]) -> None:
    done.append(name)
    raise OSError(name)


def test_all_steps_are_taken_and_the_first_failure_is_raised() -> None:
    done: list[str] = []
    with pytest.raises(OSError, match="one"):
        do_all(lambda: failing("one", done), lambda: failing("two", done), lambda: done.append("three"))
    assert done == ["one", "two", "three"]


def test_failure_of_closing_does_not_hide_that_of_the_block() -> None:
    done: list[str] = []
    with pytest.raises(ValueError, match="block"), closed_by(lambda: failing("close", done)):
        raise ValueError("block")
    with pytest.raises(OSError, match="close"), closed_by(lambda: failing("close", done)):
        pass
    assert done == ["close", "close"]
