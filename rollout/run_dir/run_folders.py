"""Folders inside of a run, which are made only where the run is, and files there that a crash may lose."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from rollout.run_dir.file_system import FileSystem
from rollout.run_dir.paths import RunPaths


def make_run_folder(files: FileSystem, paths: RunPaths, folder: Path) -> None:
    """Create a folder of a run that has begun.

    Raises:
        FileNotFoundError: the run is gone, moved or unmounted. A worker that went on would do all of it again, in a
            folder that nobody looks at.
    """
    if not files.exists(paths.run):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(paths.run))
    files.make_folder(folder)


def put_unflushed(files: FileSystem, paths: RunPaths, path: Path, data: bytes, writer: str) -> None:
    """Write a file of a run that has begun, which appears whole; it replaces one that is there. A crash may lose it.

    Args:
        writer: names the temporary file; no other process has the same.

    Raises:
        FileNotFoundError: the run is gone.
    """
    temporary = paths.temporary(path, writer)
    make_run_folder(files, paths, path.parent)
    files.make_folder(temporary.parent)
    files.remove(temporary)
    with files.open_new(temporary) as file:
        file.write(data)
    files.rename(temporary, path)
