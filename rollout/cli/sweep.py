"""The jobs of a sweep (``-m``): their folders, and what became of each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from rollout.cli.again import Again
from rollout.cli.overrides import Words
from rollout.cli.quoting import shell_word
from rollout.errors import Exit, InputError

_LONGEST_NAME = 100


@dataclass(frozen=True, slots=True)
class Job:
    """What a job must know of the sweep it belongs to; jobs may run in other processes."""

    folders: tuple[str, ...] = ()
    """``output.dir`` by job number; empty where no sweep changes it."""
    again: Again | None = None
    """The run that a retry goes on with."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended."""

    status: Exit
    sentence: str = ""
    """What its user was told, if it failed."""
    overrides: tuple[str, ...] = ()
    """The overrides of this job of a sweep."""


class LaunchFailed(Exception):
    """The launcher of a sweep did not return its jobs' outcomes; the message is one sentence."""


#: Runs a composed configuration; ``job`` is a keyword, so that the function can be sent to another process with it.
Task = Callable[..., Outcome]


def job_overrides(composed: DictConfig, loader: Any) -> list[list[str]]:
    """Return the overrides of each job, in the order of Hydra's sweeper."""
    task = OmegaConf.to_container(composed.hydra.overrides.task, resolve=False)
    params = OmegaConf.to_container(composed.hydra.sweeper.params or OmegaConf.create({}), resolve=True)
    assert isinstance(task, list)
    assert isinstance(params, dict)
    words = [*(f"{key!s}={value}" for key, value in params.items()), *map(str, task)]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(words)
    return list(chain.from_iterable(BasicSweeper.split_arguments(parsed, None)))


def job_folders(jobs: Sequence[Sequence[str]], folders: Sequence[str], *, named: bool) -> list[str]:
    """Return ``output.dir`` of each job: as configured if they differ, else a folder each inside it.

    Args:
        jobs: the overrides of each job.
        folders: ``output.dir`` as each job's configuration has it.
        named: whether the command line gives ``output.dir``.

    Raises:
        InputError: the command line gives one folder for several jobs.
    """
    shared = {folder for folder, count in Counter(folders).items() if count > 1}
    if not shared:
        return list(folders)
    swept = [Words.of(word).key for word in _swept(jobs, jobs[0])]
    if named:
        plain = [key for key in swept if "." in key or key == "seed"]
        name = f"${{{plain[0]}}}" if len(swept) == 1 and plain else "${hydra:job.num}"
        folder = sorted(shared)[0]
        raise InputError(
            f"Several jobs of this sweep would write to output.dir={folder}: "
            f"write {shell_word(f'output.dir={folder}/{name}')}."
        )
    names = []
    for folder, job in zip(folders, jobs, strict=True):
        same = [other for other, where in zip(jobs, folders, strict=True) if where == folder]
        names.append(f"{folder}/{_name(_swept(same, job))}" if folder in shared else folder)
    if len(set(names)) < len(names) or max(map(len, names)) > _LONGEST_NAME:
        return [f"{folder}/{number}" if folder in shared else folder for number, folder in enumerate(folders)]
    return names


def _swept(jobs: Sequence[Sequence[str]], job: Sequence[str]) -> list[str]:
    """Return the overrides of a job that not all jobs have."""
    everywhere = set.intersection(*map(set, jobs))
    return [word for word in job if word not in everywhere]


def _name(words: Iterable[str]) -> str:
    """Return a folder's name for overrides: ``temperature-0.5_n-4``."""
    parts = [f"{Words.of(word).key.rpartition('.')[2]}-{Words.of(word).text}" for word in words]
    return "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-.") for part in parts)


def outcomes(returned: Any) -> list[Outcome]:
    """Return the outcomes from what Hydra's sweeper returns: for each batch, a sequence of `JobReturn`."""
    return [result.return_value for batch in returned for result in batch]


def describe(ended: Sequence[Outcome]) -> list[str]:
    """Return a line for each job of a sweep that did not end with status 0."""
    if len(ended) < 2:
        return []
    jobs = [outcome.overrides for outcome in ended]
    return [
        f"Job {number} ({' '.join(_swept(jobs, outcome.overrides))}) ended with status {int(outcome.status)}"
        + (f": {outcome.sentence}" if outcome.sentence else ".")
        for number, outcome in enumerate(ended)
        if outcome.status != Exit.COMPLETE
    ]
