"""Which tasks of a SLURM array to submit again for what is missing of a run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rollout.run_dir.attempts import read_attempts
from rollout.run_dir.claims import part_starts
from rollout.run_dir.run import RunDir
from rollout.run_dir.shard_checks import damage_of

_MOST_TASKS = 1000
"""Of an array at SLURM's default MaxArraySize, 1001, whose largest index is 1000."""


@dataclass(frozen=True, slots=True)
class MissingTasks:
    """What is missing of a run, and the tasks whose own part it is."""

    uncommitted: tuple[int, ...]
    """Shards that nobody has committed."""
    damaged: tuple[int, ...]
    """Shards that are not what their manifests say."""
    shards: int
    """Shards of the run."""
    samples: int
    """Samples of both."""
    tasks: tuple[int, ...]
    """Ids of array tasks, in order."""

    @property
    def array(self) -> str:
        """The tasks as ``sbatch --array=`` takes them: ``0,3-7``; empty if nothing is missing."""
        return compress(self.tasks)

    def sentence(self) -> str:
        """Say what is missing."""
        shards = f"{len(self.uncommitted) + len(self.damaged)} of {self.shards} shards ({self.samples:,} samples)"
        if not self.damaged:
            return f"{shards} are missing."
        return (
            f"{shards} are missing, of which {len(self.damaged)} are damaged: a job with output.check=full finds all "
            "of these and generates them again."
        )


def missing_tasks(run: RunDir) -> MissingTasks:
    """Find the tasks that begin with a shard that is missing or damaged, in the array that the run began with.

    A task begins with its own part of the shards and helps others then, so any task could finish the run. These are as
    many as can work side by side, each on a part of its own. A run that began outside an array is divided among as many
    tasks as it had workers.
    """
    committed = run.committed()
    uncommitted = tuple(shard for shard in range(run.shards) if shard not in committed)
    damaged = tuple(shard for shard in sorted(committed) if damage_of(run, shard, full=True))
    missing = sorted([*uncommitted, *damaged])
    array, workers = _begun_with(list(read_attempts(run.files, run.paths)))
    tasks = _tasks_of(missing, run.shards, workers, array["tasks"])
    ids = tuple(array["first"] + task * array["step"] for task in tasks)
    return MissingTasks(uncommitted, damaged, run.shards, run.samples_of(missing), ids)


def _begun_with(attempts: list[dict[str, Any]]) -> tuple[Mapping[str, int], int]:
    """Return the array that the run began with, and the workers of all its tasks."""
    for attempt in attempts:
        if attempt.get("array"):
            return attempt["array"], attempt["workers"]
    workers = attempts[0]["workers"] if attempts else 1
    return {"first": 0, "step": 1, "tasks": min(workers, _MOST_TASKS)}, workers


def _tasks_of(shards: Iterable[int], count: int, workers: int, tasks: int) -> list[int]:
    """Return the numbers of the tasks whose workers begin with these of ``count`` shards."""
    starts = part_starts(count, max(workers, tasks))
    owners = {bisect_right(starts, shard) - 1 for shard in shards}
    return sorted({owner * tasks // len(starts) for owner in owners})


def compress(numbers: Iterable[int]) -> str:
    """Return ascending numbers as a list of ranges."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
