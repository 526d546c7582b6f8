"""Try on a run's own file system what the safety of its records rests on."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from rollout.errors import InputError
from rollout.run_dir.file_system import FileSystem, contents, write_new


def check_file_system(files: FileSystem, folder: Path, name: str) -> None:
    """Check that a folder's file system creates exclusively, links, renames and flushes.

    Args:
        folder: where to try it; it exists.
        name: begins the names of the files that are tried, which no other process uses.

    Raises:
        InputError: it does not; the message says what, and what to do.
    """
    first, second, third = (folder / f"{name}-try-{number}" for number in range(3))
    try:
        for path in (first, second, third):
            files.remove(path)
        write_new(files, first, contents(b"1"))
        _refuses(lambda: files.open_new(first).close(), "create files exclusively", folder)
        files.link(first, second)
        if not files.same(first, second):
            raise _unusable("link files", folder)
        write_new(files, third, contents(b"3"))
        _refuses(lambda: files.link(third, second), "refuse a second link of the same name", folder)
        files.rename(third, second)
        if files.read(second) != b"3" or files.exists(third):
            raise _unusable("rename a file over another", folder)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise _unusable("link files", folder) from error
        raise
    finally:
        for path in (first, second, third):
            files.remove(path)
    _check_folder_flush(files, folder)


def _check_folder_flush(files: FileSystem, folder: Path) -> None:
    try:
        files.sync_folder(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
            raise
        raise _unusable("flush the names in a folder", folder) from error


def _refuses(action: Callable[[], object], what: str, folder: Path) -> None:
    try:
        action()
    except FileExistsError:
        return
    raise _unusable(what, folder)


def _unusable(what: str, folder: Path) -> InputError:
    return InputError(
        f"The file system of {folder} cannot {what}, which keeps several workers and interruptions from losing or "
        "doubling records: set output.dir to a folder on another one."
    )
