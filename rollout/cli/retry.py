"""Read the command line of a retry, and run its job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from rollout.cli.again import Again, execution_words, overridden
from rollout.cli.application import Application
from rollout.cli.command_line import parse_command_line
from rollout.cli.quoting import literal
from rollout.cli.run import run_composed
from rollout.cli.sweep import Job, Outcome
from rollout.errors import Exit, InputError
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import read_run_json

_COMMAND = "python -m rollout.retry DIR"
_CLASSES = "error_class"


def run_retry(arguments: Sequence[str]) -> int:
    """Run what the command line asks for, and return the exit status.

    Raises:
        InputError: it is wrong, or the folder holds no run; nothing has run.
    """
    named, command = parse_command_line(arguments).of_one_run(_COMMAND, "A retry")
    folder = str(Path(named).expanduser())
    stored = read_run_json(RunPaths(Path(folder))).get("config") or {}
    words = command.words
    classes = [word.partition("=")[2] for word in words if word.startswith(f"{_CLASSES}=")]
    words = [word for word in words if not word.startswith(f"{_CLASSES}=")]
    composing = execution_words(words, stored)
    again = Again(folder, stored, overridden(words), _error_classes(classes[-1]) if classes else None)

    def run_again(composed: DictConfig, *, job: Job) -> Outcome:
        return run_composed(composed, job=replace(job, again=again))

    with Application(replace(command, words=[*composing, f"output.dir={literal(folder)}"])) as application:
        return max((outcome.status for outcome in application.run(run_again)), default=Exit.COMPLETE)


def _error_classes(text: str) -> frozenset[str]:
    names = frozenset(name.strip() for name in text.strip("[]").split(",")) - {""}
    if not names:
        raise InputError(f"{_CLASSES} names no class of errors: write e.g. {_CLASSES}=reward_failed.")
    return names
