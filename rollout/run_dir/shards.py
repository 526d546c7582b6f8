"""Committed shards: their schema, their files, and the manifest that commits each."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rollout.errors import InputError
from rollout.models.errors import first_line
from rollout.records import Record
from rollout.run_dir.atomic_write import write_atomically, write_text_atomically
from rollout.run_dir.paths import RunPaths

SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string()),
        pa.field("sample", pa.int32()),
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("completion_ids", pa.list_(pa.int32())),
        pa.field("text", pa.string()),
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("sampler_logprobs", pa.list_(pa.float32())),
        pa.field("finish_reason", pa.string()),
        pa.field("error_class", pa.string()),
        pa.field("error", pa.string()),
        pa.field("reward", pa.float32()),
        pa.field("seed", pa.int64()),
        pa.field("weight_version", pa.int32()),
        pa.field("attempt", pa.int32()),
    ]
)


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


def commit(paths: RunPaths, index: int, form: str, records: Sequence[Record], fingerprint: str) -> Manifest:
    """Write a shard and then its manifest, which commits it.

    A kill between the two leaves a shard without a manifest, and the next worker writes both again.
    """
    path = paths.shard(index, form)
    write_atomically(path, paths.temporary(path), lambda target: _WRITERS[form](records, target))
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


def read_shard(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a shard as a table with the declared schema.

    Raises:
        ValueError: the file cannot be read, or has another schema.
    """
    try:
        if path.suffix == ".parquet":
            found = pq.read_schema(path)
            if not found.equals(SCHEMA):
                raise ValueError(f"its schema differs from the declared one: {_schema_difference(found)}")
            return pq.read_table(path, columns=columns)
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        for number, record in enumerate(records, 1):
            if not isinstance(record, dict) or list(record) != SCHEMA.names:
                raise ValueError(f"line {number} does not have the declared columns")
        table = pa.Table.from_pylist(records, schema=SCHEMA)
        return table if columns is None else table.select(columns)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(first_line(error)) from error


def _schema_difference(found: pa.Schema) -> str:
    differing = [
        f"{name} is {found.field(name).type if name in found.names else 'absent'}"
        for name in SCHEMA.names
        if name not in found.names or not found.field(name).equals(SCHEMA.field(name))
    ]
    return ", ".join(differing or [f"columns {', '.join(found.names)}"])


def _write_parquet(records: Sequence[Record], path: Path) -> None:
    pq.write_table(table_of(records), path, compression="zstd")


def _write_jsonl(records: Sequence[Record], path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            values = {name: getattr(record, name) for name in SCHEMA.names}
            file.write(json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n")


_WRITERS = {"parquet": _write_parquet, "jsonl": _write_jsonl}


def table_of(records: Sequence[Record]) -> pa.Table:
    """Convert records into a table with the declared schema."""
    return pa.Table.from_arrays([_column(records, field) for field in SCHEMA], schema=SCHEMA)


def _column(records: Sequence[Record], field: pa.Field) -> pa.Array:
    values: list[Any] = [getattr(record, field.name) for record in records]
    if not pa.types.is_list(field.type):
        return pa.array(values, field.type)
    dtype = field.type.value_type.to_pandas_dtype()
    flat = np.concatenate([np.empty(0, dtype), *(np.asarray(value, dtype) for value in values)])
    return pa.ListArray.from_arrays(_offsets(values), pa.array(flat), type=field.type)


def _offsets(values: Iterable[Sequence[Any]]) -> pa.Array:
    return pa.array(np.cumsum([0, *(len(value) for value in values)]), pa.int32())
