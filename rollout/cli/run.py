"""Run the jobs of a command line, and tell their user how they ended."""

from __future__ import annotations

import logging
import sys
import traceback

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rollout.cli.application import Application
from rollout.cli.command_line import CommandLine
from rollout.cli.sweep import Job, Outcome, describe
from rollout.config.compose import given_parameters, validate
from rollout.config.escapes import warn_about_escapes
from rollout.errors import Exit, InputError
from rollout.models.errors import UnsupportedModel

logger = logging.getLogger(__name__)


def run(command: CommandLine) -> int:
    """Run what the command line asks for and return the exit status, the worst one of a sweep.

    Raises:
        InputError: the command line or a configuration file is wrong; nothing has run.
    """
    with Application(command) as application:
        ended = application.run(run_composed)
    for line in describe(ended):
        print(line, file=sys.stderr)
    return max((outcome.status for outcome in ended), default=Exit.COMPLETE)


def run_composed(composed: DictConfig, *, job: Job) -> Outcome:
    """Run one composed job. Hydra calls this, in another process where the launcher of a sweep says so.

    What it raises is no longer readable once another process has sent it, so it raises nothing.
    """
    overrides = tuple(HydraConfig.get().overrides.task)
    folder = "output.dir"
    try:
        # Validate first: the job imports datasets, torch and transformers, which take seconds.
        config = validate(composed)
        warn_about_escapes(config.sampling.stop, config.data.system_prompt)
        if job.folders:
            config.output.dir = job.folders[HydraConfig.get().job.num]
        folder = config.output.dir
        # Said before the imports, whose seconds would otherwise pass in silence.
        logger.info("Reading prompts from %s.", config.data.path)
        from rollout.job.job import run_job

        return Outcome(run_job(config, given=given_parameters(overrides)), overrides=overrides)
    except (InputError, UnsupportedModel) as error:
        sentence, status = " ".join(str(error).split()), Exit.BAD_INPUT
    except KeyboardInterrupt:
        sentence, status = f"Stopped: the same command resumes the run in {folder}.", Exit.RESUMABLE
    except Exception as error:  # noqa: BLE001  # whatever it is, the user is told what it means for the run
        traceback.print_exc()
        status = Exit.CRASHED
        sentence = (
            f"The job crashed ({type(error).__name__}): what {folder} holds is kept, and the same command resumes it; "
            "if it crashes again, report the lines above."
        )
    print(sentence, file=sys.stderr)
    return Outcome(status, sentence, overrides)
