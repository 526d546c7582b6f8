"""What the contract tests share."""

from __future__ import annotations

from functools import partial

import pytest

from rollout.batcher.types import IntArray
from rollout.engine.loop import Loop
from rollout.engine.scheduler import Scheduler

#: More tokens than the page tables of the live batch hold before they grow.
BEYOND_TABLE = 256


@pytest.fixture(autouse=True)
def integrity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page and state is accounted for before each decode of every engine in these tests."""
    make_room = Scheduler.make_room

    def checked(self: Scheduler, most: int | None) -> IntArray:
        slots = make_room(self, most)
        self.live.check_integrity()
        self._pool.check_integrity(self.held_pages())
        self._pool.states.check_integrity(self.held_states())
        return slots

    monkeypatch.setattr(Scheduler, "make_room", checked)


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def at_once_and_late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that uses this runs twice: with tokens that are read at once, and with such that are read a step late."""
    monkeypatch.setattr("rollout.engine.generation.Loop", partial(Loop, overlap=request.param))
