"""Claims: each shard is one worker's while it lives, and another's soon after it has died."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from rollout.run_dir.claims import Place, ShardClaims
from rollout.run_dir.file_system import LOCAL
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.workers import Heartbeat, Worker, Workers

LEASE = 120.0


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path)
    paths.shards.mkdir()
    paths.run.touch()
    return paths


def worker(number: int, **changed: object) -> Worker:
    """Describe a worker on a machine of its own."""
    described = Worker(f"{number:05d}-00000-abc", host=f"node{number}", boot="", pid=1, started="1")
    return replace(described, **changed)  # type: ignore[arg-type]


def claims(
    paths: RunPaths, shards: int, number: int = 0, count: int = 1, clock: Clock | None = None, me: Worker | None = None
) -> ShardClaims:
    me = me or worker(number)
    Heartbeat(LOCAL, paths, me).beat()
    workers = Workers(LOCAL, paths, me, LEASE, clock or Clock())
    return ShardClaims(LOCAL, paths, workers, shards, Place(number, count), random.Random(number))


def test_each_shard_is_claimed_once(paths: RunPaths) -> None:
    one, two = claims(paths, 5), claims(paths, 5, 1)
    claimed = [one.claim(), two.claim(), two.claim(), one.claim(), one.claim()]
    assert sorted(c for c in claimed if c is not None) == [0, 1, 2, 3, 4]
    assert one.claim() is None
    assert two.claim() is None


def test_worker_begins_with_its_part_and_goes_on_where_most_is_left(paths: RunPaths) -> None:
    workers = [claims(paths, 20, number, 4) for number in range(4)]
    own = [[one.claim() for _ in range(5)] for one in workers[:2]]
    assert own == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert workers[2].claim() == 10
    for index in range(5):
        commit(paths, index)
        workers[0].release(index)
    # Of the others' parts, the last has more left; its worker comes to the middle of it last.
    assert workers[0].claim() == 17
    assert workers[3].claim() == 15


def test_worker_holds_its_share_at_most(paths: RunPaths) -> None:
    one = claims(paths, 8, 0, 4)
    assert [one.claim() for _ in range(3)] == [0, 1, None]
    commit(paths, 0)
    one.release(0)
    assert one.claim() is not None


def test_committed_shard_is_not_claimed(paths: RunPaths) -> None:
    commit(paths, 0)
    one = claims(paths, 3)
    commit(paths, 1)  # after the worker looked
    assert [one.claim(), one.claim()] == [2, None]
    assert {path.name for path in paths.claims.iterdir()} == {"00002"}


def test_released_shard_can_be_claimed_by_another(paths: RunPaths) -> None:
    one, two = claims(paths, 1), claims(paths, 1, 1)
    assert one.claim() == 0
    assert two.claim() is None
    one.release(0)
    assert two.claim() == 0


def test_shard_of_a_silent_worker_is_taken_over_after_the_lease(paths: RunPaths) -> None:
    clock = Clock()
    dead, living = claims(paths, 1), claims(paths, 1, 1, clock=clock)
    assert dead.claim() == 0
    for clock.now in (0.0, LEASE / 2, LEASE - 1):
        assert living.claim() is None
    clock.now = LEASE
    assert living.claim() == 0
    # The first was not dead but slow: it can no longer give up what is another's.
    dead.release(0)
    assert paths.claim(0).read_text().strip() == worker(1).writer


def test_heartbeat_renews_the_lease(paths: RunPaths) -> None:
    clock = Clock()
    me = worker(0)
    other, living = claims(paths, 1, me=me), claims(paths, 1, 1, clock=clock)
    heart = Heartbeat(LOCAL, paths, me)
    heart.beat()
    assert other.claim() == 0
    assert living.claim() is None
    assert not living.left_to_others()  # its heartbeat has not changed yet
    for beat in range(1, 6):
        clock.now = beat * LEASE * 0.9
        heart.beat()
        assert living.claim() is None
        assert living.left_to_others()


def test_worker_of_the_same_launch_is_waited_for(paths: RunPaths) -> None:
    clock = Clock()
    first = worker(3)
    second = replace(first, writer="00003-00001-abc")
    rank_0, rank_1 = claims(paths, 1, clock=clock, me=first), claims(paths, 1, me=second)
    assert rank_1.claim() == 0
    heart = Heartbeat(LOCAL, paths, second)
    for clock.now in range(5):
        heart.beat()
        assert rank_0.claim() is None
        assert not rank_0.left_to_others()


def test_dead_process_of_this_host_is_replaced_at_once(paths: RunPaths) -> None:
    here = Worker.of_process(1, 0, {})
    dead = replace(here, writer="00000-00000-abc", started="1")
    assert claims(paths, 1, me=dead).claim() == 0
    assert claims(paths, 1, me=replace(here, host="elsewhere")).claim() is None
    assert claims(paths, 1, me=here).claim() == 0


def test_earlier_life_of_the_same_task_is_replaced_at_once(paths: RunPaths) -> None:
    first = worker(0, task="7_3_0")
    assert claims(paths, 1, me=first).claim() == 0
    assert claims(paths, 1, me=worker(1, task="7_4_0", life=1)).claim() is None
    assert claims(paths, 1, me=worker(2, task="7_3_0", life=1)).claim() == 0


def test_one_of_many_takes_over(paths: RunPaths) -> None:
    dead = claims(paths, 4)
    while dead.claim() is not None:
        pass
    clocks = [Clock() for _ in range(8)]
    others = [claims(paths, 4, number, 1, clocks[number - 1]) for number in range(1, 9)]
    for other in others:
        assert other.claim() is None
    for clock in clocks:
        clock.now = LEASE + 1
    taken: list[int] = []

    def take(other: ShardClaims) -> None:
        while (index := other.claim()) is not None:
            taken.append(index)

    threads = [threading.Thread(target=take, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Two may hold a claim that a third took and gave back at that moment; this costs time and no more.
    assert set(taken) == {0, 1, 2, 3}
    assert {int(path.name) for path in paths.claims.iterdir()} == {0, 1, 2, 3}


def test_folder_removed_by_a_worker_that_saw_the_run_complete_comes_back(paths: RunPaths) -> None:
    one = claims(paths, 2)
    LOCAL.remove_folder(paths.work)
    assert one.claim() == 0


def commit(paths: RunPaths, index: int) -> None:
    paths.manifest(index).write_text("{}")


def test_held_shard_is_not_claimed_again_though_its_claim_is_lost(paths: RunPaths) -> None:
    one = claims(paths, 2)
    assert [one.claim(), one.claim()] == [0, 1]
    # Another worker took it over, and gave it up.
    paths.claim(0).unlink()
    assert one.claim() is None


def test_a_claim_of_a_shard_that_the_run_lacks_is_left_alone(paths: RunPaths) -> None:
    clock = Clock()
    one = claims(paths, 2, clock=clock)
    for shard in (1, 2, 99999):
        paths.claim(shard).write_text("00007-00000-abc\n")
    assert one.claim() == 0
    paths.manifest(0).touch()
    one.release(0)
    assert one.claim() is None
    clock.now = LEASE + 1
    assert one.claim() == 1
    paths.manifest(1).touch()
    one.release(1)
    assert one.claim() is None
