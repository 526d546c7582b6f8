"""Read the records of a committed shard back as they were stored, a few at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rollout.models.errors import first_line
from rollout.records import REASONING, RECORD_COLUMNS, REF_LOGPROBS, Record
from rollout.run_dir.file_system import FileSystem
from rollout.run_dir.shards import UNREADABLE

_BATCH = 256
"""Records that are held at a time."""
_LISTS = ("prompt_ids", "completion_ids", "logprobs", "sampler_logprobs")
"""They become arrays, which are lists for what writes records."""


def stored_records(path: Path, columns: Sequence[str], files: FileSystem) -> Iterator[Record]:
    """Yield the records of a shard, in order, without the input's columns.

    Args:
        columns: all columns of the shard; log-probabilities that are not among them are empty.

    Raises:
        ValueError: the file cannot be read.
        FileNotFoundError: it is gone.
    """
    names = [name for name in (*RECORD_COLUMNS, REASONING, REF_LOGPROBS) if name in columns]
    absent: dict[str, Any] = {name: [] for name in _LISTS if name not in columns}
    try:
        with files.open_read(path) as file:
            for values in (_parquet if path.suffix == ".parquet" else _json_lines)(file, names):
                yield Record(**values, **absent)
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error


def _parquet(file: BinaryIO, names: list[str]) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(file).iter_batches(_BATCH, columns=names):
        columns = [_values(batch.column(name), name) for name in names]
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))


def _values(column: pa.Array, name: str) -> Sequence[Any]:
    if name not in _LISTS:
        values: list[Any] = column.to_pylist()
        return values
    return np.split(column.flatten().to_numpy(), np.cumsum(column.value_lengths().to_numpy())[:-1])


def _json_lines(file: BinaryIO, names: list[str]) -> Iterator[dict[str, Any]]:
    for line in file:
        values = json.loads(line)
        yield {name: values[name] for name in names}
