"""File systems that cannot keep a run's promises are refused in one sentence, before anything else."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from rollout.errors import InputError
from rollout.run_dir.file_system import LocalFileSystem
from rollout.run_dir.file_system_checks import check_file_system


class WithoutLinks(LocalFileSystem):
    def link(self, source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")


class LinksOver(LocalFileSystem):
    def link(self, source: Path, target: Path) -> None:
        self.remove(target)
        super().link(source, target)


class CopiesLinks(LocalFileSystem):
    def link(self, source: Path, target: Path) -> None:
        if target.exists():
            raise FileExistsError
        target.write_bytes(source.read_bytes())


class OpensExisting(LocalFileSystem):
    def open_new(self, path: Path):  # type: ignore[no-untyped-def]
        return open(path, "wb")


class WithoutFolderFlush(LocalFileSystem):
    def sync_folder(self, folder: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")


def test_this_file_system_is_fit_and_nothing_is_left_on_it(tmp_path: Path) -> None:
    check_file_system(LocalFileSystem(), tmp_path, "one")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (WithoutLinks, "link files"),
        (CopiesLinks, "link files"),
        (LinksOver, "refuse a second link"),
        (OpensExisting, "create files exclusively"),
        (WithoutFolderFlush, "flush the names"),
    ],
)
def test_unfit_file_system_is_refused(tmp_path: Path, made: Callable[[], LocalFileSystem], what: str) -> None:
    with pytest.raises(InputError, match=rf"cannot {what}.*set output\.dir to a folder on another one\.$"):
        check_file_system(made(), tmp_path, "one")
