"""Compare the records of shards with the samples that a run should have.

The records of a shard are sorted by input row and sample, so they are compared by position, a batch at a time; only
where they differ is each looked up by its id.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rollout.run_dir.record_lines import SampleKey
from rollout.run_dir.row_index import RowIndex
from rollout.run_dir.run import RunDir
from rollout.run_dir.shard_batches import read_batches
from rollout.run_dir.shards import COUNTED_COLUMNS, RecordCounts, total_length, value_counts

Codes = npt.NDArray[np.int64]
"""Samples of the run as numbers: the input row's number times the samples of a row, plus the sample's."""
T = TypeVar("T")

SHOWN = 20
"""Most items of each kind to keep; the others are counted."""
_NONE = np.zeros(0, np.int64)


@dataclass
class Listed(Generic[T]):
    """Items of which the first are kept, and all counted."""

    first: list[T] = field(default_factory=list)
    count: int = 0

    def __len__(self) -> int:
        return self.count

    def extend(self, items: Iterable[T], count: int) -> None:
        """Add ``count`` items, of which ``items`` yields at least the first `SHOWN`."""
        self.first += [item for item, _ in zip(items, range(SHOWN - len(self.first)), strict=False)]
        self.count += count


@dataclass
class ShardRecords:
    """What a shard holds, and how it differs from what it should hold."""

    counts: RecordCounts
    errors: Listed[tuple[SampleKey, str]]
    """Samples with an error, and its class."""
    foreign: Listed[str] = field(default_factory=Listed)
    """Samples that the run does not have."""
    missing: Codes = field(default_factory=lambda: _NONE)
    duplicated: Codes = field(default_factory=lambda: _NONE)
    strays: Codes = field(default_factory=lambda: _NONE)
    """Samples of other shards."""


class ShardComparison:
    """Compares the shards of a run with its row ids."""

    def __init__(self, run: RunDir, row_ids: pa.ChunkedArray) -> None:
        self._run = run
        self._row_ids = row_ids

    def compare(self, shard: int) -> ShardRecords:
        """Compare a shard.

        Raises:
            ValueError: its file cannot be read.
        """
        return self._by_position(shard) or self._by_id(shard)

    def key(self, code: int) -> SampleKey:
        """Return a sample by its code."""
        row, sample = divmod(code, self._run.samples)
        return SampleKey(self._row_ids[row].as_py(), sample)

    def codes(self, shard: int) -> range:
        """Return the samples of a shard."""
        rows = self._run.shard_rows(shard)
        return range(rows.start * self._run.samples, rows.stop * self._run.samples)

    def _batches(self, shard: int) -> Iterable[pa.Table]:
        return read_batches(self._run.paths.shard(shard, self._run.format), COUNTED_COLUMNS, self._run.files)

    def _by_position(self, shard: int) -> ShardRecords | None:
        """Return what a shard holds if that is every one of its samples, once and in order; else None."""
        expected = self.codes(shard)
        tally = _Tally()
        start = expected.start
        for table in self._batches(shard):
            stop = start + table.num_rows
            if stop > expected.stop:
                return None
            if start < stop:
                rows, samples = np.divmod(np.arange(start, stop), self._run.samples)
                ids = self._row_ids.slice(rows[0], rows[-1] - rows[0] + 1).take(pa.array(rows - rows[0]))
                same = table.column("sample").equals(pa.chunked_array([samples], pa.int32()))
                if not same or not table.column("row_id").equals(ids):
                    return None
                tally.add(table, rows)
            start = stop
        return ShardRecords(tally.counts(), tally.errors) if start == expected.stop else None

    @cached_property
    def _index(self) -> RowIndex:
        return RowIndex(self._row_ids)

    def _by_id(self, shard: int) -> ShardRecords:
        expected = self.codes(shard)
        occurrences = np.zeros(len(expected), np.int64)
        tally = _Tally()
        foreign = Listed[str]()
        strays = [_NONE]
        unknown: dict[str, int] = {}
        for table in self._batches(shard):
            ids = table.column("row_id").to_pylist()
            samples = table.column("sample").to_numpy().astype(np.int64)
            rows = self._index.rows(ids)
            known = (rows >= 0) & (samples >= 0) & (samples < self._run.samples)
            codes = rows * self._run.samples + samples
            own = known & (codes >= expected.start) & (codes < expected.stop)
            np.add.at(occurrences, codes[own] - expected.start, 1)
            strays.append(codes[known & ~own])
            others = np.flatnonzero(~known)
            foreign.extend((f"{ids[i]} sample {samples[i]}" for i in others), len(others))
            for number in np.flatnonzero(rows < 0):
                rows[number] = unknown.setdefault(ids[number], -1 - len(unknown))
            tally.add(table, rows)
        return ShardRecords(
            tally.counts(),
            tally.errors,
            foreign,
            missing=np.flatnonzero(occurrences == 0) + expected.start,
            duplicated=np.flatnonzero(occurrences > 1) + expected.start,
            strays=np.concatenate(strays),
        )


class _Tally:
    """Counts and sums over the records of a shard, as they come in batches."""

    def __init__(self) -> None:
        self.errors = Listed[tuple[SampleKey, str]]()
        self._rows = [_NONE]
        self._error_rows = [_NONE]
        self._classes: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._samples = self._prompt_tokens = self._completion_tokens = 0
        self._rewards = [np.zeros(0)]

    def add(self, table: pa.Table, rows: Codes) -> None:
        """Count a batch of records.

        Args:
            rows: numbers of their input rows; those of ids that the run does not have are negative.
        """
        classes = table.column("error_class")
        in_error = np.flatnonzero(pc.not_equal(classes, "").to_numpy())
        failed = table.select(["row_id", "sample", "error_class"]).take(pa.array(in_error))
        shown = failed.slice(0, SHOWN).to_pylist()
        errors = ((SampleKey(row["row_id"], row["sample"]), row["error_class"]) for row in shown)
        self.errors.extend(errors, len(in_error))
        self._rows.append(np.unique(rows))
        self._error_rows.append(np.unique(rows[in_error]))
        self._classes.update(value_counts(failed.column("error_class")))
        self._reasons.update(value_counts(table.column("finish_reason")))
        self._samples += table.num_rows
        self._prompt_tokens += total_length(table.column("prompt_ids"))
        self._completion_tokens += total_length(table.column("completion_ids"))
        self._rewards.append(table.column("reward").drop_null().cast(pa.float64()).to_numpy())

    def counts(self) -> RecordCounts:
        """Return the counts of all batches."""
        rewards = np.concatenate(self._rewards)
        return RecordCounts(
            rows=len(np.unique(np.concatenate(self._rows))),
            samples=self._samples,
            error_rows=len(np.unique(np.concatenate(self._error_rows))),
            errors=dict(self._classes),
            finish_reasons=dict(self._reasons),
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            rewards=len(rewards),
            reward_sum=math.fsum(rewards),
        )
