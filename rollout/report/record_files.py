"""Read the finished records of a run in batches of few columns: committed shards, and part files of the others."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from rollout import record_columns
from rollout.models.errors import first_line
from rollout.records import REASONING, RECORD_COLUMNS, REF_LOGPROBS, Record
from rollout.run_dir.file_system import LOCAL
from rollout.run_dir.json_values import json_value
from rollout.run_dir.part_file import ShardKey, finished_records
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import RunDir

T = TypeVar("T")

BATCH_RECORDS = 8192
_JSON_BLOCK_BYTES = 1 << 25
"""Read at a time; a line of JSON must be shorter."""
SCHEMA = pa.schema(
    record_columns.SCHEMA.field(name)
    for name in (
        *("row_id", "sample", "prompt_ids", "completion_ids"),
        *("finish_reason", "error_class", "error", "reward"),
    )
)
"""The columns that statistics need. Others, above all log-probabilities, are most of a file and are skipped."""
_LOGPROBS = frozenset({"logprobs", "sampler_logprobs", REF_LOGPROBS})


class UnreadableFile(ValueError):
    """A file of records cannot be read."""


@dataclass(frozen=True, slots=True)
class RecordFile:
    """The finished records of one shard: its committed file, or the folder of its part files."""

    path: Path
    parts: ShardKey | None = None
    """What the part files are of; None for a committed file."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def bytes(self) -> int:
        files = [self.path] if self.parts is None else self.path.iterdir()
        return sum(file.stat().st_size for file in files)

    def part_records(self, key: ShardKey) -> Iterator[Record]:
        """Yield the finished records of the part files."""
        return finished_records(LOCAL, RunPaths(self.path.parent.parent.parent), key)


def record_files(run: RunDir) -> list[RecordFile]:
    """Return the file of each shard that has finished records, in the order of the shards."""
    chosen = []
    for shard in range(run.shards):
        if run.paths.manifest(shard).exists():
            chosen.append(RecordFile(run.paths.shard(shard, run.format)))
        else:
            chosen.append(RecordFile(run.paths.parts(shard), ShardKey(run.fingerprint.digest, shard)))
    return [file for file in chosen if file.path.exists()]


def read_batches(file: RecordFile) -> Iterator[pa.RecordBatch]:
    """Yield the columns of `SCHEMA`; the records of a shard are never held together.

    Raises:
        UnreadableFile: the file is torn, or lacks a column.
    """
    path = file.path
    try:
        if file.parts is not None:
            yield from _part_batches(file.part_records(file.parts))
        elif path.suffix == ".parquet":
            with pq.ParquetFile(path) as parquet:
                for batch in parquet.iter_batches(BATCH_RECORDS, columns=SCHEMA.names):
                    yield batch.select(SCHEMA.names).cast(SCHEMA)
        else:
            options = pa.json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="ignore")
            with pa.json.open_json(path, pa.json.ReadOptions(block_size=_JSON_BLOCK_BYTES), options) as reader:
                yield from reader
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UnreadableFile(first_line(error)) from error


def _part_batches(records: Iterator[Record]) -> Iterator[pa.RecordBatch]:
    while some := list(islice(records, BATCH_RECORDS)):
        columns = [pa.array([getattr(record, field.name) for record in some], field.type) for field in SCHEMA]
        yield pa.record_batch(columns, schema=SCHEMA)


def read_records(file: RecordFile, rows: Collection[int]) -> dict[int, dict[str, Any]]:
    """Return the records at some positions of a file that `read_batches` has read, without log-probabilities.

    Raises:
        UnreadableFile: the file cannot be read any more.
    """
    path = file.path
    try:
        if file.parts is not None:
            names = [name for name in (*RECORD_COLUMNS, REASONING) if name not in _LOGPROBS]
            found = _at(file.part_records(file.parts), rows)
            return {row: {name: getattr(record, name) for name in names} for row, record in found}
        if path.suffix == ".parquet":
            return _parquet_records(path, rows)
        with open(path, "rb") as opened:
            lines = ((row, json.loads(line)) for row, line in _at(opened, rows))
            return {row: {name: value for name, value in line.items() if name not in _LOGPROBS} for row, line in lines}
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UnreadableFile(first_line(error)) from error


def _at(items: Iterable[T], rows: Collection[int]) -> Iterator[tuple[int, T]]:
    """Yield the items at some positions."""
    last = max(rows)
    return ((row, item) for row, item in enumerate(islice(items, last + 1)) if row in rows)


def _parquet_records(path: Path, rows: Collection[int]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    with pq.ParquetFile(path) as file:
        columns = [name for name in file.schema_arrow.names if name not in _LOGPROBS]
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            if any(start <= row < end for row in rows):
                at = start
                for batch in file.iter_batches(BATCH_RECORDS, row_groups=[group], columns=columns):
                    for row in rows:
                        if at <= row < at + len(batch):
                            found[row] = {name: json_value(batch.column(name)[row - at]) for name in columns}
                    at += len(batch)
            start = end
    return found
