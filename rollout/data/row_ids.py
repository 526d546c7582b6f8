"""The ids of all input rows, held as Arrow data: memory-mapped where it lies in a file."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_BLOCK = 1000
_CHUNK = 1 << 16
"""Ids of a record batch."""

Hashes = npt.NDArray[np.uint64]


class RowIds(Sequence[str]):
    """Ids by the number of the input row."""

    def __init__(self, ids: pa.ChunkedArray) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, int):
            return str(self._ids[index].as_py())
        start, stop, step = index.indices(len(self))
        if step != 1:
            return [self[number] for number in range(start, stop, step)]
        return list(self._ids.slice(start, max(0, stop - start)).to_pylist())

    def __iter__(self) -> Iterator[str]:
        return self.within(0, len(self))

    def within(self, start: int, stop: int) -> Iterator[str]:
        """Yield the ids of the input rows ``[start, stop)``, of which only a block is ever decoded at a time."""
        for low in range(start, min(stop, len(self)), _BLOCK):
            yield from self[low : min(low + _BLOCK, stop)]


class HashCounter:
    """Counts the earlier occurrences of 64-bit hashes, in 8 bytes for each.

    Hashes lie in sorted runs, of which those of similar lengths are merged: few runs are searched at any time.
    """

    def __init__(self) -> None:
        self._runs: list[Hashes] = []

    def add(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        """Return how often each hash came before, in earlier calls or earlier in this one, and remember them all."""
        order = np.argsort(hashes, kind="stable")
        ranked = hashes[order]
        firsts = np.searchsorted(ranked, ranked, side="left")
        within = np.arange(len(ranked)) - firsts
        before = np.empty(len(hashes), np.int64)
        before[order] = within
        for run in self._runs:
            before += np.searchsorted(run, hashes, side="right") - np.searchsorted(run, hashes, side="left")
        self._runs.append(ranked)
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            merged = np.concatenate(self._runs[-2:])
            merged.sort(kind="stable")
            self._runs[-2:] = [merged]
        return before


def first_duplicate(id_of: Callable[[int], str], hashes: Hashes) -> tuple[int, int] | None:
    """Return the first row whose id an earlier one has, after that earlier one; None if all ids differ.

    Args:
        id_of: gives the id of a row.
        hashes: of the ids of all rows: equal ids have equal ones, and few others do.
    """
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    same = ranked[1:] == ranked[:-1]
    candidates = order[np.concatenate([[False], same]) | np.concatenate([same, [False]])]
    candidates.sort()
    first: dict[str, int] = {}
    for index in candidates:
        row_id = id_of(int(index))
        if first.setdefault(row_id, int(index)) != index:
            return first[row_id], int(index)
    return None


class RowIdWriter:
    """Writes ids into a sink as an Arrow IPC stream."""

    _SCHEMA = pa.schema([("row_id", pa.string())])

    def __init__(self, sink: Checksummed) -> None:
        self._writer = pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), self._SCHEMA)
        self._waiting: list[str] = []

    def write(self, ids: list[str]) -> None:
        """Append ids."""
        self._waiting += ids
        if len(self._waiting) >= _CHUNK:
            self._flush()

    def close(self) -> None:
        """End the stream."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        ids = pa.array(self._waiting, pa.string())
        self._writer.write_batch(pa.record_batch([ids], schema=self._SCHEMA))
        self._waiting = []


class Checksummed(io.RawIOBase):
    """Passes bytes on to a sink, which it leaves open, and sums them up."""

    def __init__(self, sink: Any) -> None:
        super().__init__()
        self._sink = sink
        self.bytes = 0
        self.crc32 = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._sink.write(view)
        self.bytes += len(view)
        self.crc32 = zlib.crc32(view, self.crc32)
        return len(view)
