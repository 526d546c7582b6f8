"""``python -m rollout [+experiment=NAME] [key=value ...]``: a job, started from the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rollout.config import CONFIG_MODULE, CONFIG_NAME, VERSION_BASE, register, validated
from rollout.errors import Exit, InputError
from rollout.models.errors import UnsupportedModel
from rollout.override_errors import explain

# Hydra gives a task no way to say its exit status; a sweep runs several tasks.
_statuses: list[Exit] = []


@hydra.main(version_base=VERSION_BASE, config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)
def _task(composed: DictConfig) -> Exit:
    try:
        # The job imports datasets, torch and transformers; a mistyped value is told before that.
        config = validated(composed)
        from rollout.job.job import run_job

        status = run_job(config)
    except (InputError, UnsupportedModel) as error:
        print(_one_line(str(error)), file=sys.stderr)
        status = Exit.BAD_INPUT
    _statuses.append(status)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job that the command line describes, and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    overrides = ["reward=none" if argument == "reward=null" else argument for argument in given]
    register()
    _statuses.clear()
    try:
        with _as_hydra_wants_it(overrides):
            _task()
    except (HydraException, OmegaConfBaseException) as error:
        print(_one_line(explain([o for o in overrides if not o.startswith("-")], error)), file=sys.stderr)
        return Exit.BAD_INPUT
    return max(_statuses, default=Exit.COMPLETE)


@contextmanager
def _as_hydra_wants_it(arguments: list[str]) -> Iterator[None]:
    """Hydra reads ``sys.argv``, and hands errors on, instead of ending the process, where a variable says so."""
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
