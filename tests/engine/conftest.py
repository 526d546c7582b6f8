"""Fixtures of the tests of the generation loop."""

from __future__ import annotations

import pytest

from rollout.engine import loop as loop_module
from tests.support.toy_loop import World


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def late_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a test twice: with tokens read at once, and with tokens read one step late."""
    late: bool = request.param
    monkeypatch.setattr(World, "late", late)
    return late


@pytest.fixture
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up soon on a row that never fits."""
    monkeypatch.setattr(loop_module, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(loop_module, "_RETRY_S", 0.002)
