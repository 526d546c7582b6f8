"""Records of a shard that is being worked on: one JSON line each, kept through kills."""

from __future__ import annotations

import base64
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from rollout.records import Record

logger = logging.getLogger(__name__)

SYNC_SECONDS = 1.0
"""A power cut loses what finished in this time; a kill of the process loses nothing that finished."""

# Lists of numbers are base64 of their little-endian bytes: exact, a fifth of the size of decimal text, and the
# engine's loop does not wait for thousands of numbers to be printed.
_ARRAYS = {"prompt_ids": "<i4", "completion_ids": "<i4", "logprobs": "<f4", "sampler_logprobs": "<f4"}
_FIELDS = tuple(f.name for f in fields(Record))

Key = tuple[str, int]
"""Row id and sample."""


def encode_record(record: Record) -> bytes:
    """A record as one line."""
    values = {name: getattr(record, name) for name in _FIELDS}
    for name, dtype in _ARRAYS.items():
        values[name] = base64.b64encode(np.asarray(values[name], dtype=dtype).tobytes()).decode("ascii")
    return json.dumps(values, separators=(",", ":")).encode("ascii") + b"\n"


def decode_record(line: bytes) -> Record:
    """The record of a line.

    Raises:
        ValueError: the line is not that of a whole record.
    """
    values: Any = json.loads(line)
    if not isinstance(values, dict) or set(values) != set(_FIELDS):
        raise ValueError("not the fields of a record")
    for name, dtype in _ARRAYS.items():
        values[name] = np.frombuffer(base64.b64decode(values[name], validate=True), dtype=dtype).tolist()
    return Record(**values)


def whole_records(path: Path) -> Iterator[Record]:
    """The records of a part file that others may be writing to, up to the first line that is not whole."""
    with open(path, "rb") as file:
        for line in file:
            try:
                record = decode_record(line)
            except (ValueError, TypeError):
                return
            yield record


class PartFile:
    """The part file of one shard, open by the worker that holds the shard's claim."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._synced = clock()
        self.done: set[Key] = set()
        """Which samples are there."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._file = os.fdopen(descriptor, "r+b")
        self._recover()

    def append(self, record: Record) -> None:
        """Add a record: from here on, a kill of the process does not lose it."""
        key = (record.row_id, record.sample)
        assert key not in self.done, f"{key} is finished already"
        self._file.write(encode_record(record))
        self._file.flush()
        self.done.add(key)
        if self._clock() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring all of it to the disk."""
        os.fsync(self._file.fileno())
        self._synced = self._clock()

    def records(self) -> Iterator[Record]:
        """All records, in the order they finished."""
        with open(self.path, "rb") as file:
            for line in file:
                yield decode_record(line)

    def close(self) -> None:
        self.sync()
        self._file.close()

    def _recover(self) -> None:
        """Read what is there up to the first line that is not whole, and cut the rest off.

        That is the tail that a kill tore; after a power cut it may be more than one line. What is cut off is
        generated again, the same.
        """
        end = 0
        for line in self._file:
            try:
                record = decode_record(line)
            except (ValueError, TypeError):
                break
            if not line.endswith(b"\n") or (record.row_id, record.sample) in self.done:
                break
            self.done.add((record.row_id, record.sample))
            end += len(line)
        size = self._file.seek(0, os.SEEK_END)
        if end < size:
            logger.info("%s: the last %d bytes are no whole record, and are generated again.", self.path, size - end)
        self._file.truncate(end)
        self._file.seek(end)
