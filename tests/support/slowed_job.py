"""``python -m tests.support.slowed_job SECONDS OVERRIDES`` runs a job whose engine takes so long for each step more."""

from __future__ import annotations

import logging
import sys
import time

from rollout.config.compose import load_config
from rollout.engine.loop import Loop
from rollout.engine.step_reporter import StepResult
from rollout.job.job import run_job

if __name__ == "__main__":
    seconds = float(sys.argv[1])
    step = Loop._step

    def slowed(loop: Loop) -> StepResult:
        time.sleep(seconds)
        return step(loop)

    Loop._step = slowed  # type: ignore[method-assign]
    logging.basicConfig(level=logging.INFO)
    sys.exit(run_job(load_config(sys.argv[2:])))
