"""Committed shards: their schema, their files, and the manifest that commits each."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rollout.errors import InputError
from rollout.models.errors import first_line
from rollout.record_columns import SCHEMA, as_utf8
from rollout.records import Record
from rollout.run_dir.atomic_write import write_atomically, write_text_atomically
from rollout.run_dir.json_values import json_value
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.record_table import KeptRows, table_of

_BLOCK_BYTES = 1 << 26
"""Input columns are copied in blocks of about this size, since every sample of a row has a copy of them."""


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


def read_manifest(path: Path) -> Manifest:
    """Read a shard's manifest.

    Raises:
        InputError: the manifest cannot be read.
    """
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a manifest: {error}.") from error


def count_records(records: Sequence[Record]) -> RecordCounts:
    """Count records, which may be in any order."""
    return RecordCounts(
        rows=len({record.row_id for record in records}),
        samples=len(records),
        error_rows=len({record.row_id for record in records if record.error_class}),
        errors=dict(Counter(record.error_class for record in records if record.error_class)),
        finish_reasons=dict(Counter(record.finish_reason for record in records)),
        prompt_tokens=sum(len(record.prompt_ids) for record in records),
        completion_tokens=sum(len(record.completion_ids) for record in records),
        rewards=sum(record.reward is not None for record in records),
        reward_sum=sum(record.reward for record in records if record.reward is not None),
    )


COUNTED_COLUMNS = [
    *("row_id", "sample", "prompt_ids", "completion_ids"),
    *("finish_reason", "error_class", "reward"),
]
"""The columns that `count_table` reads."""


def count_table(table: pa.Table) -> RecordCounts:
    """Count the records of a shard that was read, as `count_records` does; rewards are summed in fp32's precision."""
    rows, classes = table.column("row_id"), table.column("error_class")
    in_error = pc.not_equal(classes, "")
    rewards = table.column("reward")
    return RecordCounts(
        rows=pc.count_distinct(rows).as_py(),
        samples=table.num_rows,
        error_rows=pc.count_distinct(rows.filter(in_error)).as_py(),
        errors=_value_counts(classes.filter(in_error)),
        finish_reasons=_value_counts(table.column("finish_reason")),
        prompt_tokens=_total(pc.list_value_length(table.column("prompt_ids"))),
        completion_tokens=_total(pc.list_value_length(table.column("completion_ids"))),
        rewards=len(rewards) - rewards.null_count,
        reward_sum=float(_total(rewards.cast(pa.float64()))),
    )


def _value_counts(values: pa.ChunkedArray) -> dict[str, int]:
    return {str(entry["values"]): entry["counts"] for entry in values.value_counts().to_pylist()}


def _total(values: pa.ChunkedArray) -> Any:
    return pc.sum(values, min_count=0).as_py()


def commit(
    paths: RunPaths,
    index: int,
    form: str,
    records: Sequence[Record],
    fingerprint: str,
    *,
    schema: pa.Schema = SCHEMA,
    kept: KeptRows | None = None,
) -> Manifest:
    """Write a shard and then its manifest, which commits it.

    A kill between the two leaves a shard without a manifest, and the next worker writes both again.

    Args:
        schema: the columns to write.
        kept: those of them that are the input's.
    """
    path = paths.shard(index, form)
    blocks = _blocks(records, kept)
    write_atomically(path, paths.temporary(path), lambda target: _WRITERS[form](blocks, schema, target))
    manifest = Manifest(
        **asdict(count_records(records)),
        shard=index,
        file=path.name,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        fingerprint=fingerprint,
    )
    manifest_path = paths.manifest(index)
    text = json.dumps(asdict(manifest), indent=2) + "\n"
    write_text_atomically(manifest_path, paths.temporary(manifest_path), text)
    return manifest


def file_sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    except (OSError, pa.ArrowException) as error:
        raise ValueError(first_line(error)) from error


def read_shard(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a shard as a table; a record's columns have the declared types.

    In JSON lines, input columns have the types that their values suggest, or are JSON text where values are mixed.

    Raises:
        ValueError: the file cannot be read, or has other columns than a record's and the input's.
    """
    try:
        if path.suffix == ".parquet":
            found = pq.read_schema(path)
            _check_schema(found)
            return pq.read_table(path, columns=columns)
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        names = list(records[0]) if records and isinstance(records[0], dict) else SCHEMA.names
        for number, record in enumerate(records, 1):
            if not isinstance(record, dict) or list(record) != names or not record.keys() >= _REQUIRED:
                raise ValueError(f"line {number} does not have the declared columns")
        wanted = names if columns is None else columns
        return pa.table({name: _read_column([record[name] for record in records], name) for name in wanted})
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(first_line(error)) from error


_OPTIONAL = {"logprobs", "sampler_logprobs"}
_REQUIRED = set(SCHEMA.names) - _OPTIONAL


def _check_schema(found: pa.Schema) -> None:
    """Refuse a schema without a record's columns, or with other types of them."""
    differing = [
        f"{field.name} is {found.field(field.name).type if field.name in found.names else 'absent'}"
        for field in SCHEMA
        if (field.name in _REQUIRED if field.name not in found.names else found.field(field.name).type != field.type)
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


class _Block(NamedTuple):
    """Records that are written together, and their input columns."""

    records: Sequence[Record]
    kept: pa.Table


def _blocks(records: Sequence[Record], kept: KeptRows | None) -> Iterator[_Block]:
    if kept is None or not kept.table.num_columns:
        yield _Block(records, pa.table({}))
        return
    bytes_per_row = kept.table.nbytes // kept.table.num_rows + 1
    size = max(1, _BLOCK_BYTES // bytes_per_row)
    for start in range(0, len(records), size):
        yield _Block(records[start : start + size], kept.table.take(pa.array(kept.indices[start : start + size])))


def _write_parquet(blocks: Iterable[_Block], schema: pa.Schema, path: Path) -> None:
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for records, kept in blocks:
            writer.write_table(table_of(records, schema, kept))


def _write_jsonl(blocks: Iterable[_Block], schema: pa.Schema, path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for records, kept in blocks:
            for number, record in enumerate(records):
                values = {
                    name: json_value(kept.column(name)[number]) if name in kept.column_names else getattr(record, name)
                    for name in schema.names
                }
                line = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
                file.write(as_utf8(line) + "\n")


_Writer = Callable[[Iterable[_Block], pa.Schema, Path], None]
_WRITERS: dict[str, _Writer] = {"parquet": _write_parquet, "jsonl": _write_jsonl}
