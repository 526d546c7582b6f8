"""Write files that appear complete or not at all, even after a power cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, temporary: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill ``temporary``, then rename it to ``path`` in one step.

    ``temporary`` must be on the same file system, and no other process may use it meanwhile.
    """
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_text_atomically(path: Path, temporary: Path, text: str) -> None:
    """Write a UTF-8 text file as `write_atomically` does."""
    write_atomically(path, temporary, lambda target: _write_text(target, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk; ``fsync`` of a file does not flush its name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
