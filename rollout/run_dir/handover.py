"""How samples pass from a busy worker to an idle one: asks, gifts, and where they lie.

Nothing depends on them but time, as with claims. An ask or a gift that is lost, stale or damaged leaves samples with
the worker that has claimed their shard; what a shard holds is decided when it is committed.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rollout.run_dir.file_system import FileSystem, names_in
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.record_lines import SampleKey
from rollout.run_dir.run_folders import put_unflushed
from rollout.run_dir.sealed_json import seal, unseal

logger = logging.getLogger(__name__)

_ASKS_READ = 8
"""Asks that one look reads."""


@dataclass(frozen=True, slots=True)
class Gift:
    """Samples that one worker hands to another, in a file that the other removes once it is done with them."""

    path: Path
    shard: int
    giver: str
    taker: str
    samples: frozenset[SampleKey]


class Handover:
    """One worker's side of the files by which samples are handed over."""

    def __init__(self, files: FileSystem, paths: RunPaths, writer: str, rng: random.Random | None = None) -> None:
        self._files = files
        self._paths = paths
        self._writer = writer
        self._random = rng or random.Random(writer)
        self._numbers = count()

    def ask(self, giver: str, values: Mapping[str, Any]) -> None:
        """Ask a busy worker for samples.

        Args:
            values: what it needs to know to choose them.
        """
        self._write(self._paths.ask(giver, self._writer), values)

    def withdraw(self, giver: str) -> None:
        """Take an ask back; the giver may have answered it."""
        self._files.remove(self._paths.ask(giver, self._writer))

    def asked(self, giver: str) -> bool:
        """Return whether an ask has not been answered."""
        return self._files.exists(self._paths.ask(giver, self._writer))

    def asks(self) -> dict[str, dict[str, Any]]:
        """Return what some of the workers say that ask this one, by writer."""
        names = [name for name in names_in(self._files, self._paths.asks(self._writer)) if name.endswith(".json")]
        found = {}
        for name in self._random.sample(names, min(len(names), _ASKS_READ)):
            taker = name.removesuffix(".json")
            values = self._read(self._paths.ask(self._writer, taker))
            if values is not None:
                found[taker] = values
        return found

    def answer(self, taker: str) -> None:
        """Remove the ask of a worker that is given samples, or gets none."""
        self._files.remove(self._paths.ask(self._writer, taker))

    def give(self, taker: str, shard: int, samples: frozenset[SampleKey]) -> Gift:
        """Hand samples over; what is known of them must be on the disk."""
        path = self._paths.given(taker) / f"{shard:05d}-{self._writer}-{next(self._numbers)}.json"
        self._write(path, {"shard": shard, "giver": self._writer, "samples": sorted(samples)})
        return Gift(path, shard, self._writer, taker, samples)

    def gifts(self) -> list[Gift]:
        """Return what this worker has been given and has not finished."""
        folder = self._paths.given(self._writer)
        gifts = []
        for name in sorted(names_in(self._files, folder)):
            values = self._read(folder / name)
            try:
                assert values is not None
                samples = frozenset(SampleKey(str(row_id), int(sample)) for row_id, sample in values["samples"])
                gifts.append(Gift(folder / name, int(values["shard"]), str(values["giver"]), self._writer, samples))
            except (AssertionError, KeyError, TypeError, ValueError):
                # Its giver goes on with the samples when the file is gone.
                self._files.remove(folder / name)
        return gifts

    def finish(self, gift: Gift) -> None:
        """Remove a gift: its samples are done, or this worker goes on with none of them."""
        self._files.remove(gift.path)

    def open(self, gift: Gift) -> bool:
        """Return whether the taker has not finished a gift."""
        return self._files.exists(gift.path)

    def _write(self, path: Path, values: Mapping[str, Any]) -> None:
        """Write a file. A crash that loses it costs the time until a lease ends."""
        put_unflushed(self._files, self._paths, path, seal(values), self._writer)

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            return unseal(self._files.read(path))
        except (FileNotFoundError, ValueError) as error:
            logger.debug("%s cannot be read: %s", path, error)
            return None
