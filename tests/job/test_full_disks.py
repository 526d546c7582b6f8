"""Jobs on a real file system that is full, or read-only for a time: they end with 75, and are completed afterwards."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rollout.job.job
from rollout.__main__ import main
from tests.support.jobs import JOB, FakeEngine, config_of, load_fake, read_records, without_attempt


class Disk:
    """A small file system in memory."""

    def __init__(self, folder: Path, size: str) -> None:
        self.folder = folder
        folder.mkdir()
        _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))

    def remount(self, option: str) -> None:
        _mount("-o", f"remount,{option}", str(self.folder))


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    try:
        disk = Disk(folder, getattr(request, "param", "8m"))
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or error
        pytest.skip(f"file systems may not be mounted here: {why}")
    yield disk
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def words(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a command whose engine is a fake one, and whose run is on the disk."""
    config_of(tmp_path)
    monkeypatch.setattr(rollout.job.job, "load_engine", load_fake())
    return [f"model.path={tmp_path / 'model'}", f"output.dir={disk.folder / 'out'}", *JOB]


# Full before the run has begun to generate, in claims, part files and commits.
@pytest.mark.parametrize("disk", ["16k", "28k", "40k", "52k", "56k", "64k", "76k", "84k"], indirect=True)
def test_full_disk(
    words: list[str], disk: Disk, uninterrupted: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 75
    told = capsys.readouterr().err
    assert "Traceback" not in told
    last = told.splitlines()[-1]
    assert last.startswith(f"No space is left for {disk.folder / 'out'}")
    assert last.endswith(": free some, and the same command resumes the run.")
    # Again while it is full: the same, and no wait for the first attempt's claims.
    assert main(words) == 75
    disk.remount("size=8m")
    assert main(words) == 0
    assert without_attempt(read_records(disk.folder / "out")) == without_attempt(uninterrupted)


def test_read_only_for_a_time(
    words: list[str],
    disk: Disk,
    uninterrupted: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as stopped:
        stopped.setattr(rollout.job.job, "load_engine", load_fake(FakeEngine(signal_after=17)))
        assert main(words) == 75
    disk.remount("ro")
    capsys.readouterr()
    assert main(words) == 75
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "is on a file system that can only be read: make it writable, " in told.splitlines()[-1]
    disk.remount("rw")
    assert main(words) == 0
    assert without_attempt(read_records(disk.folder / "out")) == without_attempt(uninterrupted)
