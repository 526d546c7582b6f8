"""Queue a sweep's job again where SLURM runs it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

from hydra.core.hydra_config import HydraConfig

from rollout.errors import Exit

logger = logging.getLogger(__name__)


def requeue_if_submitted() -> None:
    """End this process and have SLURM start the job again, if submitit started it there; for a job that stopped early.

    Returns where submitit did not start the job, or has started it as often as `hydra.launcher.max_num_timeout` says:
    its launcher then learns the job's status.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return
    if int(os.environ.get("SLURM_RESTART_COUNT") or 0) >= int(HydraConfig.get().launcher.max_num_timeout):
        return
    if os.environ.get("SLURM_PROCID", "0") == "0":
        # Of an array, this task alone: its plain job id may mean all of them.
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{task}"
        logger.info("Queueing job %s again.", job)
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    # Without a result, for which the launcher would stop waiting.
    sys.exit(Exit.RESUMABLE)
