"""Committed shards: their schema, their files, and the manifest that commits each."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rollout.errors import InputError
from rollout.models.errors import first_line
from rollout.record_columns import SCHEMA
from rollout.records import Record
from rollout.run_dir.file_system import LOCAL, FileSystem
from rollout.run_dir.sealed_json import unseal


@dataclass(frozen=True, slots=True)
class RecordCounts:
    """Counts and sums over records."""

    rows: int
    """Input rows."""
    samples: int
    """Records; in a complete shard, the input rows times the samples of each."""
    error_rows: int
    """Input rows with an error in at least one sample."""
    errors: dict[str, int]
    """Records with an error, by class."""
    finish_reasons: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    rewards: int
    """Records with a reward."""
    reward_sum: float


@dataclass(frozen=True, slots=True)
class Manifest(RecordCounts):
    """Description of a committed shard: its counts, its file and the digest of that file."""

    shard: int
    file: str
    bytes: int
    sha256: str
    fingerprint: str


def read_manifest(path: Path, files: FileSystem = LOCAL) -> Manifest:
    """Read a shard's manifest.

    Raises:
        InputError: the manifest cannot be read.
    """
    try:
        manifest = Manifest(**unseal(files.read(path)))
        for field in fields(Manifest):
            if type(getattr(manifest, field.name)).__name__ != str(field.type).partition("[")[0]:
                raise TypeError(f"{field.name} is {getattr(manifest, field.name)!r}, which is no {field.type}")
        return manifest
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a manifest: {error}.") from error


class CountedRecords:
    """Counts records as they come."""

    def __init__(self) -> None:
        self._rows: set[str] = set()
        self._error_rows: set[str] = set()
        self._errors: Counter[str] = Counter()
        self._finish_reasons: Counter[str] = Counter()
        self._samples = self._prompt_tokens = self._completion_tokens = 0
        self._rewards: list[float] = []

    def add(self, records: Iterable[Record]) -> None:
        """Count some records."""
        for record in records:
            self._rows.add(record.row_id)
            self._samples += 1
            self._finish_reasons[record.finish_reason] += 1
            self._prompt_tokens += len(record.prompt_ids)
            self._completion_tokens += len(record.completion_ids)
            if record.error_class:
                self._error_rows.add(record.row_id)
                self._errors[record.error_class] += 1
            if record.reward is not None:
                # As files hold them.
                self._rewards.append(float(np.float32(record.reward)))

    def counts(self) -> RecordCounts:
        """Return the counts of the records so far."""
        return RecordCounts(
            rows=len(self._rows),
            samples=self._samples,
            error_rows=len(self._error_rows),
            errors=dict(self._errors),
            finish_reasons=dict(self._finish_reasons),
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            rewards=len(self._rewards),
            reward_sum=math.fsum(self._rewards),
        )


COUNTED_COLUMNS = [
    *("row_id", "sample", "prompt_ids", "completion_ids"),
    *("finish_reason", "error_class", "reward"),
]
"""The columns that `count_table` reads."""


def count_table(table: pa.Table) -> RecordCounts:
    """Count the records of a shard that was read, as `CountedRecords` does."""
    rows, classes = table.column("row_id"), table.column("error_class")
    in_error = pc.not_equal(classes, "")
    rewards = table.column("reward")
    return RecordCounts(
        rows=pc.count_distinct(rows).as_py(),
        samples=table.num_rows,
        error_rows=pc.count_distinct(rows.filter(in_error)).as_py(),
        errors=value_counts(classes.filter(in_error)),
        finish_reasons=value_counts(table.column("finish_reason")),
        prompt_tokens=total_length(table.column("prompt_ids")),
        completion_tokens=total_length(table.column("completion_ids")),
        rewards=len(rewards) - rewards.null_count,
        reward_sum=math.fsum(rewards.drop_null().cast(pa.float64()).to_pylist()),
    )


def value_counts(values: pa.ChunkedArray) -> dict[str, int]:
    """Return how often each text occurs."""
    return {str(entry["values"]): entry["counts"] for entry in values.value_counts().to_pylist()}


def total_length(lists: pa.ChunkedArray) -> int:
    """Return the items of all lists together."""
    return int(pc.sum(pc.list_value_length(lists), min_count=0).as_py())


def read_columns(path: Path) -> dict[str, str]:
    """Return the type of each column of a shard; in JSON lines, all types are ``json``.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            return {field.name: str(field.type) for field in pq.read_schema(path)}
        with open(path, encoding="utf-8") as file:
            return dict.fromkeys(json.loads(file.readline()), "json")
    except UNREADABLE as error:
        raise ValueError(first_line(error)) from error


def read_shard(path: Path, columns: list[str] | None = None, files: FileSystem = LOCAL) -> pa.Table:
    """Read a shard as a table; a record's columns have the declared types.

    In JSON lines, input columns have the types that their values suggest, or are JSON text where values are mixed.

    Raises:
        ValueError: the file cannot be read, or has other columns than a record's and the input's.
    """
    try:
        if path.suffix == ".parquet":
            with files.open_read(path) as file:
                parquet = pq.ParquetFile(file)
                check_schema(parquet.schema_arrow)
                return parquet.read(columns=columns)
        with files.open_read(path) as file:
            records = [json.loads(line) for line in file]
        names = list(records[0]) if records and isinstance(records[0], dict) else SCHEMA.names
        for number, record in enumerate(records, 1):
            if not isinstance(record, dict) or list(record) != names or not record.keys() >= REQUIRED:
                raise ValueError(f"line {number} does not have the declared columns")
        wanted = names if columns is None else columns
        return pa.table({name: _read_column([record[name] for record in records], name) for name in wanted})
    except UNREADABLE as error:
        raise ValueError(first_line(error)) from error


UNREADABLE = (OSError, KeyError, TypeError, OverflowError, RecursionError, pa.ArrowException)
"""What readers raise of files that are no shard's: JSON that is too deep, values of other types, numbers too large."""
_OPTIONAL = {"logprobs", "sampler_logprobs"}
REQUIRED = set(SCHEMA.names) - _OPTIONAL


def check_schema(found: pa.Schema) -> None:
    """Refuse a schema without a record's columns, or with other types of them."""
    differing = [
        f"{field.name} is {found.field(field.name).type if field.name in found.names else 'absent'}"
        for field in SCHEMA
        if (field.name in REQUIRED if field.name not in found.names else found.field(field.name).type != field.type)
    ]
    if differing:
        raise ValueError(f"its schema differs from the declared one: {', '.join(differing)}")


def _read_column(values: list[Any], name: str) -> pa.Array:
    if name in SCHEMA.names:
        return pa.array(values, SCHEMA.field(name).type)
    try:
        return pa.array(values)
    except pa.ArrowException:
        return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
