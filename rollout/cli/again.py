"""The configuration of a run that goes on: what ``run.json`` holds, with other settings for how the job is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rollout.cli.overrides import Words
from rollout.config.schema import (
    BATCHER_SCHEMAS,
    Config,
    DataConfig,
    JobConfig,
    MemoryConfig,
    ModelConfig,
    OutputConfig,
    SamplingConfig,
)
from rollout.errors import InputError

_GROUPS = {
    "model": ModelConfig,
    "data": DataConfig,
    "sampling": SamplingConfig,
    "memory": MemoryConfig,
    "output": OutputConfig,
    "job": JobConfig,
}
_EXECUTION_GROUPS = ("batcher", "memory", "job")
_EXECUTION_KEYS = (
    *("model.device", "model.device_map", "model.tensor_parallel"),
    *("model.attention", "model.batch_invariant"),
    *("model.path", "model.revision", "model.adapter", "model.reference", "data.path", "data.lengths_from"),
    *("tracker", "output.check"),
)


@dataclass(frozen=True, slots=True)
class Again:
    """A run that goes on, from its directory alone."""

    folder: str
    """Its ``output.dir``, wherever that is now."""
    stored: Mapping[str, Any]
    """The configuration in ``run.json``."""
    keys: tuple[str, ...]
    """What the command line sets."""
    error_classes: frozenset[str] | None
    """The errors to retry; None: all."""

    def config(self, composed: Config) -> Config:
        """Return the run's configuration, with what the command line sets.

        Args:
            composed: the configuration that the words of the command line make.

        Raises:
            InputError: the stored configuration is not that of a job.
        """
        config = self._stored()
        for key in self.keys:
            group, _, name = key.partition(".")
            if name and group != "batcher":
                setattr(getattr(config, group), name, getattr(getattr(composed, group), name))
            else:
                setattr(config, group, getattr(composed, group))
        return replace(config, output=replace(config.output, dir=self.folder))

    def _stored(self) -> Config:
        stored = dict(self.stored)
        try:
            groups = {name: schema(**stored.pop(name)) for name, schema in _GROUPS.items()}
            batcher = stored.pop("batcher")
            return Config(**groups, batcher=BATCHER_SCHEMAS[batcher["name"]](**batcher), **stored)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"The configuration in {self.folder}/run.json is not that of a job of this version ({error}): run the "
                "command of the run itself."
            ) from error


def execution_words(words: Sequence[str], stored: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that set how a run's job is run, with the stored settings of its batcher.

    Raises:
        InputError: a word sets something else.
    """
    keys = [Words.of(word).key for word in words]
    for key, word in zip(keys, words, strict=True):
        if key.partition(".")[0] not in (*_EXECUTION_GROUPS, "hydra") and key not in _EXECUTION_KEYS:
            raise InputError(
                f"{word} would change what the run holds, which stays as run.json has it: leave it out, or begin "
                "another run."
            )
    if "batcher" in keys or not any(key.startswith("batcher.") for key in keys):
        return list(words)
    batcher = dict(stored.get("batcher") or {})
    name = batcher.pop("name", None)
    given = [
        f"batcher.{key}={'null' if value is None else value}"
        for key, value in batcher.items()
        if f"batcher.{key}" not in keys
    ]
    return [*([f"batcher={name}"] if name in BATCHER_SCHEMAS else []), *given, *words]


def overridden(words: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of a job's configuration that words set."""
    keys = (Words.of(word).key for word in words)
    return tuple(dict.fromkeys(key for key in keys if not key.startswith("hydra")))
