"""Commit a shard: write its records in order, put the file in place, and describe it by its manifest.

Here it is decided what a shard holds, so nothing that led here is trusted: the records are those of exactly the samples
that the shard has, each read back with its checksum, and of several writers the first is in place.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from rollout.records import Record
from rollout.run_dir.file_system import FileSystem, contents, link_first, put, see_afresh, write_new
from rollout.run_dir.hashed_file import HashedFile, file_sha256
from rollout.run_dir.part_file import Location, checked
from rollout.run_dir.record_lines import SampleKey, decode_record
from rollout.run_dir.record_table import KeptRows
from rollout.run_dir.run import RunDir
from rollout.run_dir.run_folders import make_run_folder
from rollout.run_dir.sealed_json import seal
from rollout.run_dir.shard_writers import WRITERS, Block
from rollout.run_dir.shards import (
    COUNTED_COLUMNS,
    CountedRecords,
    Manifest,
    RecordCounts,
    count_table,
    read_manifest,
    read_shard,
)

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 24
"""Records are read, converted and written in blocks of about this size: a commit needs memory for a few of them."""
_COMPARED = ("row_id", "sample", "seed", "completion_ids")
"""Files that hold the same tokens of the same samples are as good as each other."""


@dataclass(frozen=True, slots=True)
class ShardContent:
    """A shard of which all samples are finished."""

    shard: int
    keys: Sequence[SampleKey]
    """Its samples, in the order of the file."""
    locations: Mapping[SampleKey, Location]
    """Where the record of each stands."""
    kept: KeptRows | None = None
    """The input columns to write, with an index for each sample."""


class DamagedPart(Exception):
    """Records can no longer be read back from a part file: their samples must be generated again.

    Args:
        keys: the samples.
    """

    def __init__(self, keys: Sequence[SampleKey]) -> None:
        super().__init__(f"{len(keys)} records can no longer be read back from part files")
        self.keys = keys


def commit(run: RunDir, content: ShardContent, schema: pa.Schema, writer: str) -> Manifest:
    """Write a shard's file and manifest, unless another worker has.

    A kill leaves at most a file without a manifest. All records are in part files still, so the next worker commits the
    shard again.

    Args:
        schema: the columns to write.
        writer: names temporary files.

    Raises:
        DamagedPart: a record cannot be read back.
    """

    def fill(file: HashedFile) -> RecordCounts:
        counted = CountedRecords()
        WRITERS[run.format](_blocks(run.files, content, counted), schema, file)
        return counted.counts()

    return commit_file(run, content.shard, fill, writer, _COMPARED)


def commit_file(
    run: RunDir, shard: int, fill: Callable[[HashedFile], RecordCounts], writer: str, compared: Sequence[str]
) -> Manifest:
    """Commit a shard as `commit` does.

    Args:
        fill: writes the file, and returns the counts of its records.
        writer: names temporary files.
        compared: the columns by which a file without a manifest is known to be as good as this one.
    """
    files, paths = run.files, run.paths
    path, manifest_path = paths.shard(shard, run.format), paths.manifest(shard)
    temporary = paths.temporary(path, writer)

    def write(file: BinaryIO) -> tuple[HashedFile, RecordCounts]:
        hashed = HashedFile(file)
        return hashed, fill(hashed)

    make_run_folder(files, paths, paths.shards)
    written, counts = write_new(files, temporary, write)
    if _put_in_place(run, shard, path, temporary, compared):
        manifest = _describe(run, shard, path, counts, written.bytes, written.hexdigest())
    elif files.exists(manifest_path):
        files.remove(temporary)
        logger.info("Shard %d was committed by another worker meanwhile.", shard)
        return read_manifest(manifest_path, files)
    else:
        found = count_table(read_shard(path, COUNTED_COLUMNS, files))
        manifest = _describe(run, shard, path, found, files.size(path), file_sha256(path, files))
    files.remove(temporary)
    put(files, manifest_path, paths.temporary(manifest_path, writer), contents(seal(asdict(manifest))))
    return manifest


def _put_in_place(run: RunDir, shard: int, path: Path, temporary: Path, compared: Sequence[str]) -> bool:
    """Give the shard's file its name. Return False if another worker's, as good, has it already."""
    files = run.files
    for number in count():
        if link_first(files, temporary, path):
            return True
        # The other's manifest may be on its way to this machine.
        see_afresh(files, path.parent)
        if files.exists(run.paths.manifest(shard)) or _as_good(files, path, temporary, compared):
            files.sync_folder(path.parent)
            return False
        _set_aside(run, path, number)
    raise AssertionError


def _as_good(files: FileSystem, path: Path, own: Path, compared: Sequence[str]) -> bool:
    """Return whether a file in place holds what this worker's own does, in some columns.

    Raises:
        OSError: the own file is gone, since a worker that saw the run complete has tidied up, or cannot be read.
    """
    try:
        expected = read_shard(own, [*compared], files)
    except ValueError as error:
        number = errno.EIO if files.exists(own) else errno.ENOENT
        raise OSError(number, os.strerror(number), str(own)) from error
    try:
        return bool(read_shard(path, [*compared], files).equals(expected))
    except ValueError:
        return False


def _set_aside(run: RunDir, path: Path, number: int) -> None:
    """Move a file away that no manifest describes and that does not hold the shard's samples."""
    aside = run.paths.damaged / f"{path.name}.{number}"
    make_run_folder(run.files, run.paths, aside.parent)
    logger.warning("%s is not this run's, or is damaged; it is moved to %s.", path, aside)
    try:
        run.files.rename(path, aside)
    except FileNotFoundError:
        logger.debug("%s was moved by another worker.", path)


def _describe(run: RunDir, shard: int, path: Path, counts: RecordCounts, size: int, sha256: str) -> Manifest:
    return Manifest(
        **asdict(counts),
        shard=shard,
        file=path.name,
        bytes=size,
        sha256=sha256,
        fingerprint=run.fingerprint.digest,
    )


def _blocks(files: FileSystem, content: ShardContent, counted: CountedRecords) -> Iterator[Block]:
    """Read the records back in blocks."""
    kept = content.kept
    row_bytes = 0 if kept is None or not kept.table.num_columns else kept.table.nbytes // kept.table.num_rows + 1
    with ExitStack() as stack:
        opened: dict[Path, BinaryIO] = {}
        start = 0
        while start < len(content.keys):
            stop, size = start, 0
            while stop < len(content.keys) and (stop == start or size < _BLOCK_BYTES):
                size += content.locations[content.keys[stop]].length + row_bytes
                stop += 1
            keys = content.keys[start:stop]
            for path in (content.locations[key].path for key in keys):
                if path in opened:
                    continue
                try:
                    opened[path] = stack.enter_context(files.open_read(path))
                except FileNotFoundError as error:
                    # Another worker has committed the shard, or someone has removed the file.
                    gone = [key for key in content.keys if content.locations[key].path == path]
                    raise DamagedPart(gone) from error
            records = _read_records(keys, content.locations, opened)
            counted.add(records)
            yield Block(records, None if kept is None else kept.taken(start, stop))
            start = stop


def _read_records(
    keys: Sequence[SampleKey], locations: Mapping[SampleKey, Location], opened: Mapping[Path, BinaryIO]
) -> list[Record]:
    records: list[Record] = []
    damaged: list[SampleKey] = []
    for key in keys:
        location = locations[key]
        file = opened[location.path]
        file.seek(location.offset)
        try:
            record = decode_record(checked(file.read(location.length), location.header), np.asarray)
            if (record.row_id, record.sample) != key or record.finish_reason == "abort":
                raise ValueError("the line is of another sample")
        except ValueError:
            damaged.append(key)
        else:
            records.append(record)
    if damaged:
        raise DamagedPart(damaged)
    return records
