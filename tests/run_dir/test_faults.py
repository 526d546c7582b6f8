"""Errors of a run's directory, told from those of other files, and what is said about them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rollout.run_dir.faults import describe_fault
from rollout.run_dir.file_system import LOCAL, contents, put

NUMBERS = [getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "ENOENT", "EIO", "ESTALE")]


def fault(number: int, *names: str | None) -> OSError:
    first, second = (*names, None, None)[:2]
    return OSError(number, os.strerror(number), first, None, second)


@pytest.mark.parametrize("number", NUMBERS)
def test_sentence_names_the_path_and_what_to_do(number: int, tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    inside = str(tmp_path / "work" / "parts" / "00000")
    said = describe_fault(fault(number, inside), tmp_path)
    assert said is not None
    assert inside in said
    assert said.endswith("the same command resumes the run.")
    assert said.count(".") == 1 + inside.count(".")


def test_folder_that_is_gone_is_known_by_its_first_file(tmp_path: Path) -> None:
    """Whichever file was missed first."""
    said = describe_fault(fault(errno.ENOENT, str(tmp_path / "work" / "tmp" / "0-shards-00000.parquet")), tmp_path)
    assert said is not None
    assert said.startswith(f"{tmp_path / 'run.json'} is gone: ")


def test_files_of_others_are_no_fault_of_the_run(tmp_path: Path) -> None:
    for name in ("/models/weights.safetensors", f"{tmp_path}-other/file", str(tmp_path.parent)):
        assert describe_fault(fault(errno.EIO, name), tmp_path) is None
    # A connection that the reward lost names no file.
    lost = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    assert describe_fault(lost, tmp_path) is None


def test_either_of_two_names_may_be_inside(tmp_path: Path) -> None:
    said = describe_fault(fault(errno.EDQUOT, "/elsewhere", str(tmp_path / "shards")), tmp_path)
    assert said is not None
    assert said.startswith(f"The disk quota is used up at {tmp_path / 'shards'}: ")


def test_error_without_a_name_is_known_by_where_it_was_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as raised:
        put(LOCAL, tmp_path / "run.json", tmp_path / "run.tmp", contents(b"{}"))
    assert describe_fault(raised.value, tmp_path) == (
        f"No space is left for {tmp_path}: free some, and the same command resumes the run."
    )
