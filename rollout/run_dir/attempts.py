"""The attempts of a run: each launch that works on it has a number and a file of its own."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rollout.run_dir.file_system import FileSystem, contents, names_in, put, put_first
from rollout.run_dir.paths import RunPaths, numbers
from rollout.run_dir.run_folders import make_run_folder
from rollout.run_dir.sealed_json import seal, unseal
from rollout.run_dir.versions import installed_versions

logger = logging.getLogger(__name__)


def this_launch(workers: int) -> dict[str, Any]:
    """Describe the launch that this process belongs to.

    Args:
        workers: that share the run with it.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "workers": workers,
        "array": slurm_array(os.environ),
        "packages": installed_versions(),
    }


def slurm_array(environment: Mapping[str, str]) -> dict[str, int] | None:
    """Return the SLURM array whose tasks share the run: its first id, the step of ids, and how many tasks it has."""
    tasks = environment.get("SLURM_ARRAY_TASK_COUNT")
    if not tasks or "SUBMITIT_EXECUTOR" in environment:
        # Of an array that submitit starts, each task is a job of a sweep with a run of its own.
        return None
    first, step = environment.get("SLURM_ARRAY_TASK_MIN"), environment.get("SLURM_ARRAY_TASK_STEP")
    return {"first": int(first or 0), "step": int(step or 1), "tasks": int(tasks)}


def begin_attempt(files: FileSystem, paths: RunPaths, described: Mapping[str, Any], token: str) -> int:
    """Record an attempt and return its number: the first that no other launch has.

    Args:
        described: what the attempt runs with.
        token: text that no other launch has, for the name of a temporary file.
    """
    make_run_folder(files, paths, paths.attempts)
    number = len(_numbers(files, paths))
    while True:
        path = paths.attempt(number)
        if put_first(files, path, paths.temporary(path, token), contents(seal(described))):
            return number
        number += 1


def end_attempt(files: FileSystem, paths: RunPaths, number: int, ended: Mapping[str, Any], writer: str) -> None:
    """Add to an attempt's file how it ended; a file that is damaged is left as it is."""
    path = paths.attempt(number)
    described = _read_attempt(files, path)
    if described is None:
        return
    put(files, path, paths.temporary(path, writer), contents(seal({**described, **ended})))


def read_attempts(files: FileSystem, paths: RunPaths) -> Iterator[dict[str, Any]]:
    """Yield what is known of each attempt, in the order of their numbers.

    No record depends on these files: one that is damaged is left out, and a warning names it.
    """
    for number in _numbers(files, paths):
        described = _read_attempt(files, paths.attempt(number))
        if described is not None:
            yield {"attempt": number, **described}


def _read_attempt(files: FileSystem, path: Path) -> dict[str, Any] | None:
    try:
        return unseal(files.read(path))
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): what it says of its attempt is left out.", path, error)
        return None


def _numbers(files: FileSystem, paths: RunPaths) -> list[int]:
    return sorted(numbers(names_in(files, paths.attempts), ".json"))
