"""Asks and gifts: what one worker writes is what the other reads, and what is damaged is dropped."""

from __future__ import annotations

from pathlib import Path

from rollout.run_dir.file_system import LOCAL
from rollout.run_dir.handover import Handover
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.record_lines import SampleKey

SAMPLES = frozenset({SampleKey("a/b", 0), SampleKey("ü", 3)})


def two(folder: Path) -> tuple[Handover, Handover]:
    paths = RunPaths(folder)
    paths.run.touch()
    return Handover(LOCAL, paths, "giver"), Handover(LOCAL, paths, "taker")


def test_samples_pass_from_one_worker_to_another(tmp_path: Path) -> None:
    giver, taker = two(tmp_path)
    assert giver.asks() == {}
    assert taker.gifts() == []
    taker.ask("giver", {"speed": 3.5})
    assert giver.asks() == {"taker": {"speed": 3.5}}
    assert taker.asked("giver")
    gift = giver.give("taker", 7, SAMPLES)
    giver.answer("taker")
    assert not taker.asked("giver")
    assert taker.gifts() == [gift]
    assert (gift.shard, gift.giver, gift.samples) == (7, "giver", SAMPLES)
    assert giver.open(gift)
    taker.finish(gift)
    taker.finish(gift)
    assert not giver.open(gift)


def test_withdrawn_asks_are_gone(tmp_path: Path) -> None:
    giver, taker = two(tmp_path)
    taker.ask("giver", {})
    taker.withdraw("giver")
    taker.withdraw("giver")
    assert giver.asks() == {}


def test_gifts_of_one_shard_stand_beside_each_other(tmp_path: Path) -> None:
    giver, taker = two(tmp_path)
    gifts = [giver.give("taker", 7, frozenset({SampleKey("a", number)})) for number in range(3)]
    assert taker.gifts() == gifts


def test_damaged_files_are_dropped(tmp_path: Path) -> None:
    giver, taker = two(tmp_path)
    gift = giver.give("taker", 7, SAMPLES)
    gift.path.write_bytes(gift.path.read_bytes().replace(b"7", b"8"))
    assert taker.gifts() == []
    # Its giver sees that, and goes on with the samples.
    assert not giver.open(gift)
    taker.ask("giver", {"speed": 1})
    (path,) = RunPaths(tmp_path).asks("giver").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    assert giver.asks() == {}


def test_one_look_reads_few_of_many_asks(tmp_path: Path) -> None:
    giver, _ = two(tmp_path)
    for number in range(50):
        Handover(LOCAL, RunPaths(tmp_path), f"taker{number}").ask("giver", {})
    assert 0 < len(giver.asks()) <= 8
