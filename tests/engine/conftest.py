"""What the tests of the generation loop share."""

from __future__ import annotations

import pytest

from rollout.engine import loop as loop_module
from tests.support.toy_loop import World


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def late_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A test with this runs twice: with tokens that are read at once, and with such that are read a step late."""
    late: bool = request.param
    monkeypatch.setattr(World, "late", late)
    return late


@pytest.fixture
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What never fits is given up soon."""
    monkeypatch.setattr(loop_module, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(loop_module, "_RETRY_S", 0.002)
