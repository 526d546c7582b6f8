"""A tracker that fails, whenever it does, is said once and keeps nobody waiting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rollout.tracking import tracking
from rollout.tracking.tracking import Tracking

STEPS = ("start", "store_init_configuration", "log", "finish")


class Failing:
    """Raises where it is told to."""

    def __init__(self, step: str) -> None:
        self.step = step

    def __getattr__(self, name: str) -> Any:
        def called(*_: Any, **__: Any) -> None:
            if name == self.step:
                raise ConnectionError("no route to host")

        return called


@pytest.mark.parametrize("step", STEPS)
def test_failure_at_any_step_is_said_once(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # It ends after this time as well, and says so.
    monkeypatch.setattr(tracking, "_FINISH_SECONDS", 20.0)
    monkeypatch.setitem(tracking.STARTS, "wandb", lambda *_: Failing(step))  # type: ignore[index]
    with Tracking("wandb", tmp_path, "run", {"seed": 0}) as tracker:
        tracker.log({"new_tokens": 3})
        tracker.log({"new_tokens": 4})
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["tracker=wandb failed, and the work goes on without it: ConnectionError: no route to host."]
