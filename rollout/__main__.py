"""Run a job from the command line: ``python -m rollout [+experiment=NAME] [key=value ...]``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rollout.config.compose import CONFIG_MODULE, CONFIG_NAME, VERSION_BASE, register, validate
from rollout.errors import Exit, InputError
from rollout.models.errors import UnsupportedModel
from rollout.override_errors import explain

# Hydra discards the exit status of a task; a sweep runs several tasks.
_statuses: list[Exit] = []


@hydra.main(version_base=VERSION_BASE, config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)
def _task(composed: DictConfig) -> Exit:
    try:
        # Validate first: the job imports datasets, torch and transformers, which take seconds.
        config = validate(composed)
        from rollout.job.job import run_job

        status = run_job(config)
    except (InputError, UnsupportedModel) as error:
        print(_one_line(str(error)), file=sys.stderr)
        status = Exit.BAD_INPUT
    _statuses.append(status)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job that the command line describes and return its exit status, the worst one of a sweep."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    overrides = ["reward=none" if argument == "reward=null" else argument for argument in given]
    register()
    _statuses.clear()
    try:
        with _hydra_environment(overrides):
            _task()
    except (HydraException, OmegaConfBaseException) as error:
        without_flags = [override for override in overrides if not override.startswith("-")]
        print(_one_line(explain(without_flags, error)), file=sys.stderr)
        return Exit.BAD_INPUT
    return max(_statuses, default=Exit.COMPLETE)


@contextmanager
def _hydra_environment(arguments: list[str]) -> Iterator[None]:
    """Set ``sys.argv``, which Hydra reads, and ``HYDRA_FULL_ERROR``, so that it raises instead of exiting."""
    argv, variable = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if variable is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = variable


def _one_line(message: str) -> str:
    return " ".join(message.split())


if __name__ == "__main__":
    sys.exit(main())
