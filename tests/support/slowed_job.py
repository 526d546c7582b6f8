"""``python -m tests.support.slowed_job SECONDS OVERRIDES`` is the command, each of whose steps takes so long more."""

from __future__ import annotations

import sys
import time

from rollout.__main__ import command
from rollout.engine.loop import Loop
from rollout.engine.step_reporter import StepResult

if __name__ == "__main__":
    seconds = float(sys.argv.pop(1))
    step = Loop._step

    def slowed(loop: Loop) -> StepResult:
        time.sleep(seconds)
        return step(loop)

    Loop._step = slowed  # type: ignore[method-assign]
    command()
