"""Claims: which worker works on which shard, so that no two do the same work.

Nothing depends on them but time. A claim that two workers hold, or that a dead one left, costs work that is done twice
or late; what a shard holds is decided when it is committed (`rollout.run_dir.commit`).
"""

from __future__ import annotations

import logging
import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from rollout.closing import do_all
from rollout.run_dir.file_system import FileSystem, names_in
from rollout.run_dir.paths import RunPaths, numbers
from rollout.run_dir.run_folders import make_run_folder
from rollout.run_dir.workers import Workers, announce, attempt_of

logger = logging.getLogger(__name__)

_LOOKED_AT = 16
"""Holders of claims that one search asks for a sign of life."""
_OWNERS_READ = 128
"""Claims of which one search reads whose they are."""
_MISSES = 4
"""Shards in a row that others have claimed since the last survey, after which there is another."""


@dataclass(frozen=True, slots=True)
class Place:
    """A worker's place among those that begin together: each begins with its own part of the shards."""

    index: int = 0
    count: int = 1


class ShardClaims:
    """Claims shards for one worker: first those of its own part, then from where most are left, then of dead workers.

    A claim takes one link and one look at the shard's manifest. Once the worker's own part is used up, the folders of
    shards and of claims are listed, and again when others have claimed what was free then.

    Args:
        shards: how many shards the run has.
        place: of the worker.
        random: chooses among equals, so that idle workers do not all try the same.
    """

    def __init__(
        self,
        files: FileSystem,
        paths: RunPaths,
        workers: Workers,
        shards: int,
        place: Place,
        rng: random.Random | None = None,
    ) -> None:
        self._files = files
        self._paths = paths
        self.workers = workers
        self._shards = shards
        self._count = max(1, place.count)
        self._random = rng or random.Random(workers.me.writer)
        make_run_folder(files, paths, paths.claims)
        self._owned = announce(files, paths, workers.me)
        self._starts = part_starts(shards, self._count)
        part = place.index % self._count
        self._part = iter(range(self._starts[part], (part + 1) * shards // self._count))
        self.held: set[int] = set()
        """Shards that this worker has claimed."""
        self.others: dict[int, str] = {}
        """Writers that hold the shards that others had claimed when last looked."""
        self._unknown = False
        """Whether there are claims of which nobody has read whose they are."""
        self._committed = committed(files, paths)
        self._free: Iterator[int] = iter(())
        """Shards that nobody had claimed at the last survey, in the order in which to try them."""
        self._looked_at: list[str] = []
        """Holders that `left_to_others` watches."""

    def claim(self) -> int | None:
        """Claim a shard; None if there is none, or this worker has its share."""
        if len(self.held) >= self._most_held():
            return None
        for index in self._part:
            if index not in self._committed and index not in self.held and self._take(index):
                return index
        for index in islice(self._free, _MISSES):
            if index not in self.held and self._take(index):
                return index
        free, claimed = self._survey()
        self._free = iter(list(self._by_need(free)))
        for index in self._free:
            if self._take(index):
                return index
        for index in self._of_dead(claimed):
            if self._take_over(index):
                return index
        return None

    def release(self, index: int) -> None:
        """Give up a claim, committed or not; one that has been taken over is another worker's."""
        self.held.discard(index)
        if self._owner(index) == self.workers.me.writer:
            self._files.remove(self._paths.claim(index))

    def left_to_others(self) -> bool:
        """Return whether all that is left is in the hands of other launches' workers, which are alive.

        It looks at a few of them. Were another of them dead, those that are alive would find out.
        """
        me = self.workers.me
        holders = {writer for index, writer in self.others.items() if index not in self._committed}
        if not holders or self.held or self._unknown or any(attempt_of(writer) == me.attempt for writer in holders):
            return False
        self._looked_at = [writer for writer in self._looked_at if writer in holders]
        others = sorted(holders.difference(self._looked_at))
        self._looked_at += self._random.sample(others, min(len(others), _LOOKED_AT - len(self._looked_at)))
        # Look at all of them: a worker is watched from the first look on.
        alive = [self.workers.surely_alive(writer) for writer in self._looked_at]
        return all(alive)

    def close(self) -> None:
        """Release all claims."""
        steps = (partial(self.release, index) for index in tuple(self.held))
        do_all(*steps, partial(self._files.remove, self._owned))

    def _most_held(self) -> int:
        """Return how many shards this worker may hold: its share of the uncommitted ones, at least one.

        Otherwise an engine with room for a whole small run would claim all of it while other workers are still
        loading.
        """
        return max(1, -(-(self._shards - len(self._committed)) // self._count))

    def _take(self, index: int) -> bool:
        """Claim a shard that nobody holds."""
        claim = self._paths.claim(index)
        try:
            self._link(claim)
        except FileExistsError:
            # Over NFS, a link whose answer was lost is made again and finds itself.
            if self._owner(index) != self.workers.me.writer:
                return False
        if self._files.exists(self._paths.manifest(index)):
            self._committed.add(index)
            self._files.remove(claim)
            return False
        self.held.add(index)
        return True

    def _link(self, claim: Path) -> None:
        try:
            self._files.link(self._owned, claim)
        except FileNotFoundError:
            # A worker that saw the run complete removed the folder, with the file that claims are names of.
            make_run_folder(self._files, self._paths, self._paths.claims)
            self._owned = announce(self._files, self._paths, self.workers.me)
            self._files.link(self._owned, claim)

    def _take_over(self, index: int) -> bool:
        """Claim the shard of a dead worker. Of several that try, the one that renames its claim goes on."""
        dead = self.others[index]
        if self._owner(index) != dead:
            return False
        claim = self._paths.claim(index)
        aside = self._paths.temporary(claim, self.workers.me.writer)
        make_run_folder(self._files, self._paths, aside.parent)
        try:
            self._files.rename(claim, aside)
        except FileNotFoundError:
            return False
        if self._read(aside) != dead:
            # Another worker was faster, and this is its claim.
            self._restore(aside, claim)
            return False
        self._files.remove(aside)
        if not self._take(index):
            return False
        logger.info("Worker %s has died or stopped; going on with its shard %d.", dead, index)
        return True

    def _restore(self, aside: Path, claim: Path) -> None:
        try:
            self._files.link(aside, claim)
        except FileExistsError:
            logger.debug("%s was claimed a third time meanwhile.", claim)
        self._files.remove(aside)

    def _survey(self) -> tuple[list[int], list[int]]:
        """List the shards that nobody has claimed, and those that others have."""
        self._committed = committed(self._files, self._paths)
        # A claim that another run left here may be of a shard that this one does not have.
        named = numbers(names_in(self._files, self._paths.claims))
        claimed = {index for index in named if index < self._shards}
        for index in self.others.keys() - claimed:
            del self.others[index]
        # What is held is not free, even if its claim was taken over and given up: its samples are under way here.
        taken = claimed | self._committed | self.held
        free = [index for index in range(self._shards) if index not in taken]
        return free, sorted(claimed - self._committed - self.held)

    def _by_need(self, free: list[int]) -> Iterable[int]:
        """Yield free shards, from the middle of the part in which most are left: its worker comes there last."""
        if not free:
            return
        parts: dict[int, list[int]] = {}
        for index in free:
            parts.setdefault(bisect_right(self._starts, index), []).append(index)
        most = max(len(part) for part in parts.values())
        slowest = self._random.choice([part for part in parts.values() if len(part) == most])
        half = len(slowest) // 2
        yield from slowest[half:]
        yield from slowest[:half]
        rest = [index for part in parts.values() if part is not slowest for index in part]
        self._random.shuffle(rest)
        yield from rest

    def _of_dead(self, claimed: list[int]) -> Iterable[int]:
        """Yield claimed shards whose holders show no life; look at some holders, others the next time."""
        unknown = [index for index in claimed if index not in self.others]
        self._unknown = len(unknown) > _OWNERS_READ
        for index in self._random.sample(unknown, min(len(unknown), _OWNERS_READ)):
            if (owner := self._owner(index)) is not None:
                self.others[index] = owner
        held = {index: self.others[index] for index in claimed if index in self.others}
        writers = sorted(set(held.values()))
        looked_at = set(self._random.sample(writers, min(len(writers), _LOOKED_AT)))
        dead = {writer for writer in looked_at if not self.workers.alive(writer)}
        for index, writer in held.items():
            if writer in dead:
                # Whoever holds it now, it is looked at again.
                yield index
                self.others.pop(index, None)

    def _owner(self, index: int) -> str | None:
        return self._read(self._paths.claim(index))

    def _read(self, path: Path) -> str | None:
        try:
            return self._files.read(path).decode(errors="replace").strip()
        except FileNotFoundError:
            return None


def part_starts(shards: int, workers: int) -> list[int]:
    """Return the first shard of each worker's own part."""
    return [part * shards // workers for part in range(workers)]


def committed(files: FileSystem, paths: RunPaths) -> set[int]:
    """Return the shards that have a manifest."""
    return numbers(names_in(files, paths.shards), ".json")
