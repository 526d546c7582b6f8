"""Locks on shards: one worker each, released by its death, removed with the commit."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rollout.run_dir.paths import RunPaths
from rollout.run_dir.shard_locks import FileLocks, locked, try_lock, unlock


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path)
    paths.shards.mkdir()
    return paths


def test_each_shard_is_claimed_once(paths: RunPaths) -> None:
    one, two = FileLocks(paths, 5), FileLocks(paths, 5)
    claimed = [one.claim(), two.claim(), two.claim(), one.claim(), one.claim()]
    assert sorted(c for c in claimed if c is not None) == [0, 1, 2, 3, 4]
    assert one.claim() is None
    assert two.claim() is None


def test_committed_shards_are_not_claimed(paths: RunPaths) -> None:
    paths.manifest(0).write_text("{}")
    paths.manifest(2).write_text("{}")
    claims = FileLocks(paths, 4)
    assert [claims.claim() for _ in range(3)] == [1, 3, None]
    assert not paths.lock(0).exists()


def test_released_shard_can_be_claimed_again(paths: RunPaths) -> None:
    one, two = FileLocks(paths, 1), FileLocks(paths, 1)
    assert one.claim() == 0
    one.release(0, committed=False)
    assert two.claim() == 0
    two.release(0, committed=False)
    assert one.claim() == 0


def test_committed_shard_leaves_no_lock(paths: RunPaths) -> None:
    one, two = FileLocks(paths, 1), FileLocks(paths, 1)
    assert one.claim() == 0
    paths.manifest(0).write_text("{}")
    one.release(0, committed=True)
    assert list(paths.work.iterdir()) == []
    assert (one.claim(), two.claim()) == (None, None)


def test_shard_committed_before_the_lock_is_not_claimed(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = FileLocks(paths, 1)

    def commit_first(path: Path) -> int | None:
        paths.manifest(0).write_text("{}")
        return try_lock(path)

    monkeypatch.setattr("rollout.run_dir.shard_locks.try_lock", commit_first)
    assert claims.claim() is None
    assert not paths.lock(0).exists()


def test_worker_holds_at_most_its_share(paths: RunPaths) -> None:
    claims = FileLocks(paths, 8, workers=2)
    assert [claims.claim() for _ in range(5)] == [0, 1, 2, 3, None]
    for shard in (4, 5, 6, 7):
        paths.manifest(shard).write_text("{}")
    for shard in (0, 1, 2, 3):
        paths.manifest(shard).write_text("{}")
        claims.release(shard, committed=True)
    assert claims.claim() is None


def test_share_is_at_least_one_shard(paths: RunPaths) -> None:
    assert FileLocks(paths, 1, workers=9).claim() == 0


def test_removed_lock_file_can_be_locked_anew(paths: RunPaths) -> None:
    first = try_lock(paths.lock(0))
    assert first is not None
    unlock(paths.lock(0), first, remove=True)
    second = try_lock(paths.lock(0))
    assert second is not None
    assert try_lock(paths.lock(0)) is None
    unlock(paths.lock(0), second, remove=False)


def test_waiter_locks_the_file_that_has_the_name(paths: RunPaths) -> None:
    """A lock removed by its holder while another waits for it must keep a third one out."""
    held = try_lock(paths.run_lock)
    assert held is not None
    entered, leave = threading.Event(), threading.Event()

    def wait() -> None:
        with locked(paths.run_lock):
            entered.set()
            leave.wait(10)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert not entered.wait(0.2)
    unlock(paths.run_lock, held, remove=True)
    assert entered.wait(10)
    assert try_lock(paths.run_lock) is None
    leave.set()
    waiter.join()


def test_death_of_a_process_releases_its_locks(paths: RunPaths) -> None:
    code = """
import sys, time
from pathlib import Path
from rollout.run_dir.shard_locks import FileLocks
from rollout.run_dir.paths import RunPaths
claims = FileLocks(RunPaths(Path(sys.argv[1])), 1)
print(claims.claim(), flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(paths.root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "0"
    claims = FileLocks(paths, 1)
    assert claims.claim() is None
    process.kill()
    process.wait()
    process.stdout.close()
    assert claims.claim() == 0
