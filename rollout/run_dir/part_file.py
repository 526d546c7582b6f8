"""Part files: what a worker has finished of a shard that is not committed yet, one line a record.

Every part file has one writer, which never shares it, so workers that take each other for dead do no harm. Its first
line binds it to a run and a shard; every further line has a checksum that depends on that first line, so a line that
was damaged, or belongs to another file, is noticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

from rollout.records import Record
from rollout.run_dir.file_system import FileSystem, names_in
from rollout.run_dir.paths import RunPaths, numbers
from rollout.run_dir.record_lines import SampleKey, decode_record, encode_record
from rollout.run_dir.run_folders import make_run_folder

logger = logging.getLogger(__name__)

SYNC_SECONDS = 1.0
"""A power cut loses at most the records of this time; killing the process loses no finished record."""
_FORMAT = 3
_CHECKSUM_BYTES = 8


@dataclass(frozen=True, slots=True)
class ShardKey:
    """What a part file is of."""

    run: str
    """Digest of the run's fingerprint."""
    shard: int

    def header(self, writer: str) -> bytes:
        """Return the first line of a writer's part file."""
        values = {"part_format": _FORMAT, "run": self.run, "shard": self.shard, "writer": writer}
        return json.dumps(values).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Location:
    """Where a record's line stands."""

    path: Path
    offset: int
    length: int
    header: bytes

    def read(self, files: FileSystem) -> bytes:
        """Return the record's text.

        Raises:
            ValueError: the line is no longer what was written.
        """
        with files.open_read(self.path) as file:
            file.seek(self.offset)
            return checked(file.read(self.length), self.header)


class PartFile:
    """A part file of one writer and shard; a writer that comes back to a shard begins another."""

    def __init__(
        self,
        files: FileSystem,
        paths: RunPaths,
        key: ShardKey,
        writer: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = files
        self._clock = clock
        folder = paths.parts(key.shard)
        self.path, self._file = _open_new(files, paths, folder, writer)
        self._header = key.header(self.path.stem)
        self._end = 0
        try:
            self._write(self._header)
            self.sync()
            # The names of the file and of its folder; a file without a name is lost in a power cut, however flushed.
            for named in (folder.parent, paths.work, paths.root):
                files.sync_folder(named)
        except BaseException:
            # What could not be written fails once more.
            with suppress(OSError):
                self._file.close()
            raise

    def append(self, record: Record) -> Location:
        """Add a record; killing the process no longer loses it."""
        line = sealed(encode_record(record), self._header)
        location = Location(self.path, self._end, len(line), self._header)
        self._write(line)
        if self._clock() - self._synced >= SYNC_SECONDS:
            self.sync()
        return location

    def sync(self) -> None:
        """Flush the file to the disk."""
        self._files.sync(self._file)
        self._synced = self._clock()

    def close(self) -> None:
        """Flush and close the file."""
        try:
            self.sync()
        finally:
            self._file.close()

    def _write(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()
        self._end += len(line)


def _open_new(files: FileSystem, paths: RunPaths, folder: Path, writer: str) -> tuple[Path, BinaryIO]:
    for number in count():
        path = folder / (f"{writer}-{number}.jsonl" if number else f"{writer}.jsonl")
        make_run_folder(files, paths, folder)
        file = None
        try:
            file = files.open_new(path)
            files.sync_folder(folder)
        except FileExistsError:
            continue
        except FileNotFoundError:
            logger.debug("%s was removed by a worker that has committed the shard.", folder)
            if file is not None:
                file.close()
            continue
        return path, file
    raise AssertionError


def sealed(text: bytes, header: bytes) -> bytes:
    """Return a text as a line with its checksum."""
    return _checksum(text, header) + b" " + text + b"\n"


def checked(line: bytes, header: bytes) -> bytes:
    """Return the text of a line.

    Raises:
        ValueError: the line is torn, damaged, or of another file.
    """
    checksum, _, text = line.partition(b" ")
    if not text.endswith(b"\n") or checksum != _checksum(text[:-1], header):
        raise ValueError("the line is not as it was written")
    return text[:-1]


def _checksum(text: bytes, header: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=_CHECKSUM_BYTES, key=hashlib.sha256(header).digest()).hexdigest().encode()


@dataclass(frozen=True, slots=True)
class PartLine:
    """A record in a part file, and where it stands."""

    record: Record
    location: Location


def read_part(files: FileSystem, path: Path, key: ShardKey, start: int = 0) -> Iterator[PartLine]:
    """Yield the sound records of a part file; its writer may be writing to it.

    A damaged line costs its own record only. What is left out is logged.

    Args:
        start: offset of the first line to read; 0 or the end of a line.
    """
    header = key.header(path.stem)
    with files.open_read(path) as file:
        found = file.readline()
        if found != header:
            if found.endswith(b"\n"):
                logger.warning("%s is not of shard %d of this run; it is left alone.", path, key.shard)
            return
        offset = max(start, len(header))
        file.seek(offset)
        for line in file:
            try:
                record = decode_record(checked(line, header))
            except (ValueError, TypeError):
                # A last line without an end is one that its writer is at, or was killed at.
                if line.endswith(b"\n"):
                    logger.warning("A line of %s is damaged; its sample is generated again.", path)
            else:
                yield PartLine(record, Location(path, offset, len(line), header))
            offset += len(line)


@dataclass(slots=True)
class ShardParts:
    """What the part files of a shard hold, of all writers together."""

    finished: dict[SampleKey, Location]
    """Where the record of each finished sample stands."""
    under_way: dict[SampleKey, Record]
    """Records of samples that were stopped: the longest of each."""


def read_parts(files: FileSystem, paths: RunPaths, key: ShardKey) -> ShardParts:
    """Read all part files of a shard."""
    parts = ShardParts(finished={}, under_way={})
    read_on(files, paths, key, parts, {})
    return parts


def read_on(
    files: FileSystem,
    paths: RunPaths,
    key: ShardKey,
    parts: ShardParts,
    read_to: dict[Path, int],
    without: Path | None = None,
) -> None:
    """Read what has been added to a shard's part files.

    Args:
        parts: what is read is added to it.
        read_to: how far each file has been read; it is changed.
        without: a file to leave out.
    """
    for path in part_paths(files, paths, key.shard):
        if path == without:
            continue
        try:
            for line in read_part(files, path, key, read_to.get(path, 0)):
                add_line(parts, line)
                read_to[path] = line.location.offset + line.location.length
        except FileNotFoundError:
            logger.debug("%s was removed by a worker that has committed the shard.", path)


def add_line(parts: ShardParts, line: PartLine) -> None:
    """Add a record to what the parts of a shard hold. Of equal samples the first counts: they have the same tokens."""
    record = line.record
    sample = SampleKey(record.row_id, record.sample)
    if record.finish_reason != "abort":
        add_parts(parts, ShardParts({sample: line.location}, {}))
    else:
        add_parts(parts, ShardParts({}, {sample: record}))


def add_parts(parts: ShardParts, others: ShardParts) -> None:
    """Add what other parts of the shard hold."""
    for sample, location in others.finished.items():
        parts.finished.setdefault(sample, location)
        parts.under_way.pop(sample, None)
    for sample, record in others.under_way.items():
        known = parts.under_way.get(sample)
        if sample not in parts.finished and (known is None or len(known.completion_ids) < len(record.completion_ids)):
            parts.under_way[sample] = record


def part_paths(files: FileSystem, paths: RunPaths, shard: int) -> list[Path]:
    """Return the part files of a shard, the earliest writer's first."""
    folder = paths.parts(shard)
    return [folder / name for name in sorted(names_in(files, folder)) if name.endswith(".jsonl")]


def begun_shards(files: FileSystem, paths: RunPaths) -> list[int]:
    """Return the shards that have part files."""
    return sorted(numbers(names_in(files, paths.parts(0).parent)))


def finished_records(files: FileSystem, paths: RunPaths, key: ShardKey) -> Iterator[Record]:
    """Yield the finished records that part files of a shard hold, each sample once."""
    for location in read_parts(files, paths, key).finished.values():
        yield decode_record(location.read(files))
