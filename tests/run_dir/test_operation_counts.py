"""How many file operations claims, polls and looks for asks take in a large run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollout.run_dir.claims import Place, ShardClaims
from rollout.run_dir.file_system import LOCAL, FileSystem
from rollout.run_dir.handover import Handover
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.workers import Heartbeat, Worker, Workers, announce

SHARDS = 10_000
HELD = 1000
FREE = 40
WORKERS = 100


class CountingFiles:
    """Counts the operations that are made."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = getattr(LOCAL, name)

        def counted(*arguments: Any) -> Any:
            self.counts[name] += 1
            return operation(*arguments)

        return counted

    def taken(self) -> int:
        """The operations since the last call."""
        count = self.counts.total()
        self.counts.clear()
        return count


@pytest.fixture
def large(tmp_path: Path) -> RunPaths:
    """A run whose last shards are under way: some are free, the others claimed by many workers."""
    paths = RunPaths(tmp_path)
    paths.shards.mkdir()
    paths.run.touch()
    paths.claims.mkdir(parents=True)
    for index in range(SHARDS - HELD - FREE):
        paths.manifest(index).touch()
    for number in range(WORKERS):
        worker = Worker(f"{number:05d}-00000-other", "elsewhere", "", 1, "")
        Heartbeat(LOCAL, paths, worker).beat()
        owned = announce(LOCAL, paths, worker)
        for index in range(SHARDS - HELD + number, SHARDS, WORKERS):
            LOCAL.link(owned, paths.claim(index))
    return paths


def claims_of(files: FileSystem, paths: RunPaths, place: Place) -> ShardClaims:
    workers = Workers(files, paths, Worker("00500-00000-me", "here", "", 1, ""), lease_seconds=120)
    return ShardClaims(files, paths, workers, SHARDS, place)


def test_claims_take_few_operations(large: RunPaths) -> None:
    counting = CountingFiles()
    # One of few workers, so that it may hold many shards.
    claims = claims_of(counting, large, Place(0, 4))
    claims._part = iter(())
    counting.taken()
    for number in range(FREE):
        index = claims.claim()
        assert index is not None
        # A link and a look at the manifest; the first one lists two folders before.
        assert counting.taken() <= (2 if number else 4)
        claims.held.discard(index)


def test_polls_are_bounded_and_cheap_once_all_is_known(large: RunPaths) -> None:
    counting = CountingFiles()
    claims = claims_of(counting, large, Place(0, 1))
    claims._part = iter(())
    while claims.claim() is not None:
        pass
    counting.taken()
    polls = []
    for _ in range(12):
        assert claims.claim() is None
        polls.append(counting.taken())
    print(polls)
    # Two listings, some claims whose owner is not known, some heartbeats.
    assert max(polls) <= 2 + 128 + 16
    assert polls[-1] <= 2 + 16


def test_heartbeats_take_as_many_operations_as_the_page_says(large: RunPaths) -> None:
    counting = CountingFiles()
    heartbeat = Heartbeat(counting, large, Worker("00500-00000-me", "here", "", 1, ""))
    heartbeat.beat()
    counting.taken()
    heartbeat.beat()
    page = (Path(__file__).parents[2] / "docs/slurm.md").read_text(encoding="utf-8")
    assert f"| heartbeat | {counting.taken()}, " in page


def test_looks_for_asks_take_one_operation(large: RunPaths) -> None:
    counting = CountingFiles()
    handover = Handover(counting, large, "00500-00000-me")
    assert handover.asks() == {}
    assert counting.taken() == 1
    for number in range(WORKERS):
        Handover(LOCAL, large, f"{number:05d}-00000-other").ask("00500-00000-me", {})
    handover.asks()
    assert counting.taken() <= 1 + 8
