"""Run the jobs of a command line, and tell their user how they ended."""

from __future__ import annotations

import logging
import sys

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rollout.cli.application import Application
from rollout.cli.command_line import CommandLine
from rollout.cli.ending import ending
from rollout.cli.requeue import requeue_if_submitted
from rollout.cli.sweep import Job, LaunchFailed, Outcome, describe
from rollout.config.compose import given_parameters, validate
from rollout.config.escapes import warn_about_escapes
from rollout.errors import Exit
from rollout.job.stop_signals import stop_signals
from rollout.logs import say
from rollout.models.garbage import without_collections
from rollout.sampling_params import PARAMETER_NAMES

logger = logging.getLogger(__name__)


def run(command: CommandLine) -> int:
    """Run what the command line asks for and return the exit status, the worst one of a sweep.

    Raises:
        InputError: the command line or a configuration file is wrong; nothing has run.
    """
    with Application(command) as application:
        try:
            ended = application.run(run_composed)
        except LaunchFailed as error:
            say(str(error), sys.stderr)
            return Exit.CRASHED
    for line in describe(ended):
        say(line, sys.stderr)
    return max((outcome.status for outcome in ended), default=Exit.COMPLETE)


def run_composed(composed: DictConfig, *, job: Job) -> Outcome:
    """Run one composed job. Hydra calls this, in another process where the launcher of a sweep says so.

    What it raises is no longer readable once another process has sent it, so it raises nothing.
    """
    outcome = _run_composed(composed, job)
    # A deadline that the user gave is final.
    if outcome.status == Exit.RESUMABLE and composed.job.deadline is None:
        requeue_if_submitted()
    return outcome


def _run_composed(composed: DictConfig, job: Job) -> Outcome:
    overrides = tuple(HydraConfig.get().overrides.task)
    with stop_signals() as signals:
        if signals.received is not None:
            return Outcome(Exit.RESUMABLE, f"Not begun, since {signals.received.name} stopped the sweep.", overrides)
        return _run_job(composed, job, overrides)


def _run_job(composed: DictConfig, job: Job, overrides: tuple[str, ...]) -> Outcome:
    folder = "output.dir"
    try:
        # Validate first: the job imports datasets, torch and transformers, which take seconds.
        config = validate(composed)
        if job.again is not None:
            config = job.again.config(config)
        warn_about_escapes(config.sampling.stop, config.data.system_prompt)
        if job.folders:
            config.output.dir = job.folders[HydraConfig.get().job.num]
        folder = config.output.dir
        # Said before the imports, whose seconds would otherwise pass in silence.
        logger.info("Reading prompts from %s.", config.data.path)
        with without_collections():  # as in load_engine
            from rollout.job.job import run_job
            from rollout.job.retrying import Retry

        if job.again is not None:
            # All parameters are given, since those that the model recommends stand in run.json.
            return Outcome(run_job(config, given=PARAMETER_NAMES, retry=Retry(job.again.error_classes)))
        return Outcome(run_job(config, given=given_parameters(overrides)), overrides=overrides)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # whatever it is, the user is told what it means
        sentence, status = ending(error, folder)
    if sentence:
        say(sentence, sys.stderr)
    return Outcome(status, sentence, overrides)
