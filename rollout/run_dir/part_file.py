"""Part files: the finished records of an unfinished shard, one JSON line each, which survive kills."""

from __future__ import annotations

import base64
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rollout.records import REASONING, RECORD_COLUMNS, Record

logger = logging.getLogger(__name__)

SYNC_SECONDS = 1.0
"""A power cut loses at most the records of this time; killing the process loses no finished record."""

# Lists of numbers are stored as base64 of their little-endian bytes: exact, a fifth of the size of decimal text, and
# much faster to write, which the engine's loop waits for.
_ARRAYS = {"prompt_ids": "<i4", "completion_ids": "<i4", "logprobs": "<f4", "sampler_logprobs": "<f4"}
_FIELDS = (*RECORD_COLUMNS, REASONING)


class SampleKey(NamedTuple):
    """One sample of a run: the id of its input row, and its number."""

    row_id: str
    sample: int


def encode_record(record: Record) -> bytes:
    """Encode a record as one line."""
    values = {name: getattr(record, name) for name in _FIELDS}
    for name, dtype in _ARRAYS.items():
        values[name] = base64.b64encode(np.asarray(values[name], dtype=dtype).tobytes()).decode("ascii")
    return json.dumps(values, separators=(",", ":")).encode("ascii") + b"\n"


def decode_record(line: bytes) -> Record:
    """Decode a line.

    Raises:
        ValueError: the line does not hold a complete record.
    """
    values: Any = json.loads(line)
    if not isinstance(values, dict) or set(values) != set(_FIELDS):
        raise ValueError("the line does not have the fields of a record")
    for name, dtype in _ARRAYS.items():
        values[name] = np.frombuffer(base64.b64decode(values[name], validate=True), dtype=dtype).tolist()
    return Record(**values)


def read_whole_records(path: Path) -> Iterator[Record]:
    """Yield the records of a part file up to the first incomplete line; its worker may still be writing to it."""
    with open(path, "rb") as file:
        for line in file:
            try:
                record = decode_record(line)
            except (ValueError, TypeError):
                return
            yield record


def count_lines(path: Path) -> int:
    """Return how many whole lines a part file has; 0 if there is none. The records are not decoded."""
    try:
        with open(path, "rb") as file:
            return sum(line.endswith(b"\n") for line in file)
    except FileNotFoundError:
        return 0


class PartFile:
    """The part file of one shard, opened by the worker that holds the shard's lock."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._synced = clock()
        self.done: set[SampleKey] = set()
        """The samples whose records are in the file."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._file = os.fdopen(descriptor, "r+b")
        self._recover()

    def append(self, record: Record) -> None:
        """Add a record; killing the process no longer loses it."""
        key = SampleKey(record.row_id, record.sample)
        assert key not in self.done, f"{key} is finished already"
        self._file.write(encode_record(record))
        self._file.flush()
        self.done.add(key)
        if self._clock() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Flush the file to the disk."""
        os.fsync(self._file.fileno())
        self._synced = self._clock()

    def records(self) -> Iterator[Record]:
        """Yield all records, in the order they finished."""
        with open(self.path, "rb") as file:
            for line in file:
                yield decode_record(line)

    def close(self) -> None:
        self.sync()
        self._file.close()

    def _recover(self) -> None:
        """Read the records of earlier attempts, and truncate the file at the first incomplete line.

        A kill tears at most the last line, a power cut may tear several. Their samples are generated again, with the
        same result.
        """
        end = 0
        for line in self._file:
            try:
                record = decode_record(line)
            except (ValueError, TypeError):
                break
            key = SampleKey(record.row_id, record.sample)
            if not line.endswith(b"\n") or key in self.done:
                break
            self.done.add(key)
            end += len(line)
        size = self._file.seek(0, os.SEEK_END)
        if end < size:
            logger.info(
                "The last %d bytes of %s are no complete record; removing them and generating their samples again.",
                size - end,
                self.path,
            )
        self._file.truncate(end)
        self._file.seek(end)
