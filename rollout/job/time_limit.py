"""When a job must have ended: its deadline, or the end of its SLURM job."""

from __future__ import annotations

import logging
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from rollout.config.deadline import seconds_until

logger = logging.getLogger(__name__)

#: A controller that is overloaded may answer after minutes.
_SQUEUE_SECONDS = 10.0
_LEFT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d\d)")


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """The time that a job has from now on."""

    seconds: float
    name: str
    """What sets it, as a sentence names it."""


def time_limit(deadline: str | None, environment: Mapping[str, str]) -> TimeLimit | None:
    """Return the time that is left of ``job.deadline``, else of the SLURM job; None if there is no limit."""
    if deadline is not None:
        seconds = seconds_until(deadline, datetime.now().astimezone())
        assert seconds is not None, "the configuration is checked"
        return TimeLimit(seconds, "job.deadline")
    seconds = _left_in_slurm(environment)
    return None if seconds is None else TimeLimit(seconds, "SLURM's time limit")


def _left_in_slurm(environment: Mapping[str, str]) -> float | None:
    if end := environment.get("SLURM_JOB_END_TIME"):
        return float(end) - time.time()
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    if "SLURM_ARRAY_JOB_ID" in environment:
        # The number alone may be that of the whole array.
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    command = ["squeue", "-h", "-j", job, "-o", "%L"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SQUEUE_SECONDS, check=True)
        left = done.stdout.strip()
        if left == "UNLIMITED":
            return None
        match = _LEFT.fullmatch(left)
        if match is not None:
            days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
            return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
        why = f"squeue says {left!r}"
    except (OSError, subprocess.SubprocessError) as error:
        why = str(error)
    logger.warning(
        "The end of SLURM job %s is unknown (%s): without job.deadline, the job goes on until SLURM's signal.", job, why
    )
    return None
