"""A job whose run directory fails ends with status 75 and one sentence, and the same command completes it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import rollout.job.job
from rollout.__main__ import main
from rollout.records import Record
from rollout.run_dir.file_system import LocalFileSystem
from tests.support.jobs import JOB, FakeEngine, config_of, load_fake, read_records, without_attempt


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a command whose engine is a fake one."""
    config_of(tmp_path)
    monkeypatch.setattr(rollout.job.job, "load_engine", load_fake())
    return [f"model.path={tmp_path / 'model'}", f"output.dir={tmp_path / 'out'}", *JOB]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.ESTALE])
def test_job_ends_resumable_where_its_folder_fails(
    words: list[str],
    number: int,
    tmp_path: Path,
    uninterrupted: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sync, left = LocalFileSystem.sync, iter(range(12))

    def failing(self: LocalFileSystem, file: BinaryIO) -> None:
        if next(left, None) is None:
            raise OSError(number, os.strerror(number))
        sync(self, file)

    with monkeypatch.context() as broken:
        broken.setattr(LocalFileSystem, "sync", failing)
        assert main(words) == 75
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.splitlines()[-1].endswith("the same command resumes the run.")
    assert str(tmp_path / "out") in told.splitlines()[-1]
    # Nothing is left that the next attempt would have to wait for.
    assert not [path for name in ("claims", "workers") for path in (tmp_path / "out" / "work" / name).iterdir()]
    assert main(words) == 0
    assert without_attempt(read_records(tmp_path / "out")) == without_attempt(uninterrupted)


def test_other_files_are_no_fault_of_the_folder(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object) -> Any:
        raise OSError(errno.EIO, "Input/output error", "/models/weights.safetensors")

    monkeypatch.setattr(rollout.job.job, "load_engine", load)
    assert main(words) == 1
    assert "The job crashed (OSError)" in capsys.readouterr().err


def test_run_that_is_moved_away_is_not_done_again_elsewhere(
    words: list[str],
    tmp_path: Path,
    uninterrupted: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not even where its place is a folder still, as a mount point is."""
    out, away = tmp_path / "out", tmp_path / "away"
    engine = MovingEngine(after=17, source=out, target=away)
    with monkeypatch.context() as moved:
        moved.setattr(rollout.job.job, "load_engine", load_fake(engine))
        assert main(words) == 75
    # A commit that was under way may have made its folders there again.
    assert not [path for path in out.rglob("*") if path.is_file()]
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"{out}/run.json is gone: put the run's folder back, and the same command resumes the run."
    shutil.rmtree(out)
    away.rename(out)
    again = FakeEngine()
    monkeypatch.setattr(rollout.job.job, "load_engine", load_fake(again))
    assert main([*words, "job.lease_seconds=1"]) == 0
    # What was stored until the fault is not generated again.
    assert len(again.asked) + len(engine.stored) == 60
    assert without_attempt(read_records(out)) == without_attempt(uninterrupted)


class MovingEngine(FakeEngine):
    """Moves the run's folder away after so many records."""

    def __init__(self, after: int, source: Path, target: Path) -> None:
        super().__init__()
        self._after, self._source, self._target = after, source, target
        self.stored: list[Record] = []

    def run(self, *arguments: Any, **others: Any) -> Iterator[Record]:
        for record in super().run(*arguments, **others):
            if len(self.stored) == self._after:
                self._source.rename(self._target)
                self._source.mkdir()
            yield record
            self.stored.append(record)
