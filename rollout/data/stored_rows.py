"""The input rows of a store, with the columns that a job reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rollout.data.columns import field_of
from rollout.data.row_store import RowStore


@dataclass(frozen=True, slots=True)
class StoredRows:
    """The rows of a store, with the fields that dotted names refer to as further columns."""

    store: RowStore
    names: list[str]
    """Columns that rows have: all for a reward, else those that the configuration names."""
    nested: dict[str, list[str]]
    """Column and fields by each dotted name that is no column's."""

    def __len__(self) -> int:
        return len(self.store)

    def blocks(self, start: int, stop: int, size: int = 1000) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows ``[start, stop)`` in lists of at most ``size``."""
        for rows in self.store.batches(self.names, start, stop, size):
            for columns in rows:
                for name, path in self.nested.items():
                    columns[name] = field_of(columns, path)
            yield rows

    def read(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number and the columns of each of the rows ``[start, stop)``."""
        index = start
        for rows in self.blocks(start, stop):
            for columns in rows:
                yield index, columns
                index += 1
