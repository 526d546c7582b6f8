"""The simulated file system answers as a real one, loses what was not flushed, and shows late what others did."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from rollout.run_dir.file_system import FileSystem, LocalFileSystem, contents, put, put_first
from tests.support.faulty_files import Fault, FaultyFiles
from tests.support.simulated_disk import SimulatedDisk
from tests.support.simulated_files import ProcessDied, SimulatedFiles

NAMES = ("a", "b", "c")
FOLDER = Path("/run")


class Walk:
    """Random operations on one file system, drawn from a seed."""

    def __init__(self, files: FileSystem, root: Path, seed: int) -> None:
        self.files = files
        self.root = root
        self.rng = random.Random(seed)
        self.writing: list[BinaryIO] = []
        self.reading: list[BinaryIO] = []

    def path(self) -> Path:
        return self.root.joinpath(*(self.rng.choice(NAMES) for _ in range(self.rng.choice((1, 1, 2, 2, 3)))))

    def step(self) -> tuple[str, Any]:
        """Make an operation and return its name with what it answered."""
        operation = self.rng.choice(OPERATIONS)
        path, other, chance = self.path(), self.path(), self.rng.random()
        try:
            return operation.__name__, operation(self, path, other, chance)
        except OSError as error:
            return operation.__name__, (type(error), error.errno)

    def make_folder(self, path: Path, other: Path, chance: float) -> None:
        self.files.make_folder(path)

    def open_new(self, path: Path, other: Path, chance: float) -> None:
        self.writing.append(self.files.open_new(path))

    def open_read(self, path: Path, other: Path, chance: float) -> None:
        self.reading.append(self.files.open_read(path))

    def write(self, path: Path, other: Path, chance: float) -> None:
        if self.writing:
            file = self.writing[int(chance * len(self.writing))]
            if chance < 0.1:
                file.seek(int(chance * 100))
            file.write(bytes([int(chance * 256)]) * int(10 ** (chance * 4.5)))

    def flush(self, path: Path, other: Path, chance: float) -> None:
        if self.writing:
            self.writing[int(chance * len(self.writing))].flush()

    def sync(self, path: Path, other: Path, chance: float) -> None:
        if self.writing:
            self.files.sync(self.writing[int(chance * len(self.writing))])

    def close(self, path: Path, other: Path, chance: float) -> None:
        if self.writing:
            self.writing.pop(int(chance * len(self.writing))).close()

    def read_on(self, path: Path, other: Path, chance: float) -> bytes | None:
        if not self.reading:
            return None
        file = self.reading[int(chance * len(self.reading))]
        if chance < 0.2:
            file.seek(int(chance * 100))
        return file.readline() if chance < 0.3 else file.read(-1 if chance < 0.5 else int(chance * 100))

    def close_read(self, path: Path, other: Path, chance: float) -> None:
        if self.reading:
            self.reading.pop(int(chance * len(self.reading))).close()

    def read(self, path: Path, other: Path, chance: float) -> bytes:
        return self.files.read(path)

    def names(self, path: Path, other: Path, chance: float) -> list[str]:
        return sorted(self.files.names(path if chance < 0.7 else self.root))

    def exists(self, path: Path, other: Path, chance: float) -> bool:
        return self.files.exists(path)

    def size(self, path: Path, other: Path, chance: float) -> int | None:
        return self.files.size(path) if self.is_file(path) else None

    def same(self, path: Path, other: Path, chance: float) -> bool:
        return self.files.same(path, other)

    def link(self, path: Path, other: Path, chance: float) -> None:
        self.files.link(path, other)

    def rename(self, path: Path, other: Path, chance: float) -> None:
        if not self.files.exists(path) or self.is_file(path):
            self.files.rename(path, other)

    def remove(self, path: Path, other: Path, chance: float) -> None:
        self.files.remove(path)

    def remove_folder(self, path: Path, other: Path, chance: float) -> None:
        if chance < 0.3:
            self.files.remove_folder(path)

    def sync_folder(self, path: Path, other: Path, chance: float) -> None:
        self.files.sync_folder(path)

    def is_file(self, path: Path) -> bool:
        try:
            self.files.read(path)
        except OSError:
            return False
        return True


OPERATIONS: list[Callable[[Walk, Path, Path, float], Any]] = [
    *(Walk.make_folder, Walk.open_new, Walk.open_new, Walk.open_new, Walk.open_read, Walk.write, Walk.write),
    *(Walk.flush, Walk.sync, Walk.close, Walk.close, Walk.read_on, Walk.read_on, Walk.close_read, Walk.read),
    *(Walk.names, Walk.exists, Walk.size, Walk.same, Walk.link, Walk.link, Walk.rename, Walk.rename),
    *(Walk.remove, Walk.remove_folder, Walk.sync_folder),
]


@pytest.mark.parametrize("seed", range(20))
def test_simulation_answers_as_the_real_file_system(tmp_path: Path, seed: int) -> None:
    disk = SimulatedDisk(random.Random(seed))
    files = disk.process()
    files.make_folder(FOLDER)
    simulated, real = Walk(files, FOLDER, seed), Walk(LocalFileSystem(), tmp_path, seed)
    answers: Counter[str] = Counter()
    for step in range(600):
        found, expected = simulated.step(), real.step()
        assert found == expected, f"seed {seed}, step {step}"
        answers[f"{found[0]} {'fails' if isinstance(found[1], tuple) else 'works'}"] += 1
    assert len(answers) > 25, answers
    for file in (*real.writing, *real.reading):
        file.close()


def mounted(seed: int, delay: float = 0.0) -> tuple[SimulatedDisk, SimulatedFiles]:
    disk = SimulatedDisk(random.Random(seed), delay)
    files = disk.process("one")
    files.make_folder(FOLDER)
    files.sync_folder(Path("/"))
    return disk, files


def test_power_cut_loses_what_was_not_flushed() -> None:
    outcomes: Counter[bytes | None] = Counter()
    for seed in range(300):
        disk, files = mounted(seed)
        with files.open_new(FOLDER / "flushed") as file:
            file.write(b"12")
            files.sync(file)
        files.sync_folder(FOLDER)
        with files.open_new(FOLDER / "written") as file:
            for data in (b"ab", b"cd"):
                file.write(data)
                file.flush()
        disk.power_cut()
        with pytest.raises(ProcessDied):
            files.names(FOLDER)
        after = disk.process()
        assert after.read(FOLDER / "flushed") == b"12"
        outcomes[after.read(FOLDER / "written") if after.exists(FOLDER / "written") else None] += 1
    # Its name is lost, or some of its content, or a write before another.
    assert outcomes.keys() == {None, b"", b"a", b"ab", b"abc", b"abcd", b"\0\0c", b"\0\0cd"}


def test_power_cut_keeps_or_loses_a_rename_as_a_whole() -> None:
    outcomes = Counter[str]()
    for seed in range(100):
        disk, files = mounted(seed)
        for name in "ab":
            with files.open_new(FOLDER / name) as file:
                file.write(name.encode())
                files.sync(file)
        files.sync_folder(FOLDER)
        files.rename(FOLDER / "a", FOLDER / "b")
        disk.power_cut()
        after = disk.process()
        outcomes[" ".join(f"{name}={after.read(FOLDER / name).decode()}" for name in sorted(after.names(FOLDER)))] += 1
    assert outcomes.keys() == {"a=a b=b", "b=a"}


@pytest.mark.parametrize("survives", ["put", "put_first"])
def test_files_that_were_put_survive_a_power_cut_whole(survives: str) -> None:
    for seed in range(100):
        disk, files = mounted(seed)
        path, temporary = FOLDER / "file", FOLDER / "temporary"
        if survives == "put":
            put(files, path, temporary, contents(b"x" * 20_000))
        else:
            put_first(files, path, temporary, contents(b"x" * 20_000))
        disk.power_cut()
        assert disk.process().read(path) == b"x" * 20_000


def test_killed_process_loses_its_buffer_alone() -> None:
    disk, files = mounted(0)
    file = files.open_new(FOLDER / "file")
    file.write(b"written")
    file.flush()
    file.write(b"buffered")
    files.kill()
    with pytest.raises(ProcessDied):
        file.flush()
    with pytest.raises(ProcessDied):
        file.close()
    assert disk.process("one").read(FOLDER / "file") == b"written"


def test_power_cut_of_one_machine_loses_its_writes_alone() -> None:
    outcomes = Counter[bytes]()
    for seed in range(50):
        disk, files = mounted(seed)
        other = disk.process("other")
        for process, name in ((files, "mine"), (other, "others")):
            file = process.open_new(FOLDER / name)
            file.write(b"data")
            file.flush()
        disk.power_cut("one")
        assert other.read(FOLDER / "others") == b"data"
        outcomes[other.read(FOLDER / "mine")] += 1
        with pytest.raises(ProcessDied):
            files.exists(FOLDER)
    assert {b"", b"data"} < outcomes.keys()


def test_other_machine_sees_changes_late_and_never_goes_back() -> None:
    lags: list[float] = []
    for seed in range(50):
        disk, files = mounted(seed, delay=10.0)
        other = disk.process("other")
        disk.now = 100.0
        assert not other.exists(FOLDER / "file")
        file = files.open_new(FOLDER / "file")
        seen: list[bytes | None] = []
        for tenth in range(150):
            disk.now = 100 + tenth / 10
            if tenth in (0, 10, 20):
                file.write(b"x")
                file.flush()
            seen.append(other.read(FOLDER / "file") if "file" in other.names(FOLDER) else None)
        assert seen == sorted(seen, key=lambda content: -1 if content is None else len(content))
        assert seen[120] == b"xxx"
        lags.append(seen.index(b"xxx") / 10 - 2)
        # What was flushed or closed is seen by who opens the file later.
        file.write(b"y")
        files.sync(file)
        assert other.read(FOLDER / "file") == b"xxxy"
        file.write(b"z")
        file.close()
        assert other.read(FOLDER / "file") == b"xxxyz"
    assert min(lags) == 0
    assert 9 < max(lags) <= 10


def test_names_are_exclusive_though_another_machine_does_not_see_them() -> None:
    for seed in range(50):
        disk, files = mounted(seed, delay=10.0)
        other = disk.process("other")
        disk.now = 100.0
        files.open_new(FOLDER / "file").close()
        other.open_new(FOLDER / "mine").close()
        with pytest.raises(FileExistsError):
            other.link(FOLDER / "mine", FOLDER / "file")
        # Who was told of it sees it.
        assert other.exists(FOLDER / "file")


def test_faults_happen_at_every_operation_once() -> None:
    path = FOLDER / "file"

    def write(files: FileSystem) -> None:
        with files.open_new(path) as file:
            file.write(b"0123456789")
            file.flush()
            files.sync(file)
        assert files.read(path) == b"0123456789"

    disk, files = mounted(0)
    undisturbed = FaultyFiles(files)
    write(undisturbed)
    assert undisturbed.operations == ["open_new", "write", "flush", "sync", "close", "read"]
    left: dict[Fault, list[bytes | None]] = {}
    for fault in Fault:
        left[fault] = []
        for number in range(1, 7):
            disk, files = mounted(0)
            faulty = FaultyFiles(files, number, fault, files.kill)
            if fault is Fault.ENOSPC and number == 6:
                write(faulty)
                assert not faulty.happened
                continue
            with pytest.raises(ProcessDied if fault in (Fault.DIES, Fault.DIES_MIDWAY) else OSError):
                write(faulty)
            assert faulty.happened
            files.kill()
            after = disk.process()
            left[fault].append(after.read(path) if after.exists(path) else None)
    whole = b"0123456789"
    assert left[Fault.DIES] == [None, b"", b"", whole, whole, whole]
    assert left[Fault.DIES_MIDWAY] == [b"", b"01234", whole, whole, whole, whole]
    assert left[Fault.ENOSPC] == [None, b"01234", whole, whole, whole]
    assert left[Fault.EIO] == [None, b"", whole, whole, whole, whole]
    assert left[Fault.EIO_DONE] == [b"", whole, whole, whole, whole, whole]
    assert left[Fault.GONE] == [None, b"", b"", whole, whole, whole]
