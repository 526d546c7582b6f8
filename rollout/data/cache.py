"""Files that a process computes once from a dataset, and that later ones map: in the cache folder of ``datasets``."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow as pa
from filelock import FileLock, Timeout

from rollout.errors import InputError
from rollout.models.errors import first_line

logger = logging.getLogger(__name__)

T = TypeVar("T")

SMALL_BYTES = 4 << 20
"""Data of less than this is computed anew by each process, in less than a second."""


class UnwritableCache(InputError):
    """The cache folder cannot be written."""


def digest_of(key: object) -> str:
    """Return a name for what a JSON value describes."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def cached(name: str, source: str, open_buffer: Callable[[pa.Buffer], T], write: Callable[[pa.NativeFile], None]) -> T:
    """Open a file of the cache; write it first if no process has yet.

    Args:
        name: the file's name, a digest of all that its content depends on.
        source: what is read to write it, for the log.
        open_buffer: opens the mapped file, and raises ValueError if it is not whole.
        write: writes the file.

    Raises:
        UnwritableCache: the file is not there, and the folder cannot be written.
    """
    path = Path(datasets.config.HF_DATASETS_CACHE) / "rollout" / name
    if (found := _open(path, open_buffer)) is not None:
        return found
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A file system without locks costs only that several processes read the dataset.
            with suppress(OSError, NotImplementedError):
                stack.enter_context(_locked(path, source))
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        except OSError as error:
            raise UnwritableCache(
                f"The cache folder {path.parent} cannot be written ({first_line(error)}): set HF_DATASETS_CACHE to "
                "a folder with enough space."
            ) from error
        if (found := _open(path, open_buffer)) is not None:
            os.unlink(temporary)
            os.close(handle)
            return found
        try:
            with open(handle, "wb") as sink:
                write(pa.PythonFile(sink, mode="w"))
            os.chmod(temporary, 0o644)
            _publish(temporary, path, open_buffer)
            return open_buffer(pa.memory_map(str(path)).read_buffer())
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)


@contextmanager
def _locked(path: Path, source: str) -> Iterator[None]:
    """Hold the lock of a file, after the process that is writing it, if any."""
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("Another process is reading %s; waiting for what it stores.", source)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _publish(temporary: str, path: Path, open_buffer: Callable[[pa.Buffer], Any]) -> None:
    """Give a written file its place, unless another process has: a link never replaces what others have mapped."""
    try:
        os.link(temporary, path)
    except OSError:
        # The file system has no links, or something that is not whole stands there.
        if _open(path, open_buffer) is None:
            os.replace(temporary, path)


def _open(path: Path, open_buffer: Callable[[pa.Buffer], T]) -> T | None:
    """Open a file of the cache; None if there is none, or none that is whole."""
    try:
        return open_buffer(pa.memory_map(str(path)).read_buffer())
    except (OSError, ValueError):
        return None
