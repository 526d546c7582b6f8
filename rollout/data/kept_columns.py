"""The input columns that stand in a run's output, and their names there."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa

from rollout.config.schema import DataConfig
from rollout.data.cache import SMALL_BYTES, UnwritableCache, cached, digest_of
from rollout.data.column_values import MIXED
from rollout.data.row_store import RowStore, read_index, write_index
from rollout.errors import InputError
from rollout.record_columns import PREFIX

logger = logging.getLogger(__name__)

ALL = "all"
_ROWS_PER_BLOCK = 1000
_VERSION = 1
"""Raised when the digests of an earlier version are to be computed anew."""
_MAGIC = b"keptsum1"


@dataclass(frozen=True)
class KeptColumns:
    """Columns of a dataset, read from disk on demand in Arrow's types: nothing is decoded."""

    names: dict[str, str]
    """The name in the output of each input column."""
    _store: RowStore

    @property
    def schema(self) -> pa.Schema:
        """The columns under their names in the output, with the metadata by which ``datasets`` knows e.g. images."""
        fields = [(new, self._store.types[old]) for old, new in self.names.items()]
        features = {new: self._store.features[old] for old, new in self.names.items() if old in self._store.features}
        noted = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
        return pa.schema(fields, metadata=noted)

    def table(self, start: int, stop: int) -> pa.Table:
        """Return the columns of the input rows ``[start, stop)``."""
        columns = [self._store.column(name, start, stop) for name in self.names]
        return pa.table(columns, schema=self.schema)

    def digest(self) -> str:
        """Hash the names, the types and the values of all input rows; of a large dataset, the result is kept."""
        if self._store.name is not None and self._store.bytes >= SMALL_BYTES:
            name = digest_of([_VERSION, self._store.name, self.names])
            # That nothing can be kept is said where the ids are.
            with suppress(UnwritableCache, OSError):
                return cached(f"{name}.kept", "the columns that are kept", _open_digest, self._write_digest)
        return self._computed_digest()

    def _write_digest(self, sink: pa.NativeFile) -> None:
        write_index(sink, {"digest": self._computed_digest()}, _MAGIC)

    def _computed_digest(self) -> str:
        digest = hashlib.sha256(str(self.schema.remove_metadata()).encode(errors="surrogatepass"))
        for start in range(0, len(self._store) if self.names else 0, _ROWS_PER_BLOCK):
            stop = min(start + _ROWS_PER_BLOCK, len(self._store))
            # Taken rows lie in fresh buffers, so equal values have equal bytes however the dataset stores them.
            block = self.table(start, stop).take(pa.array(range(stop - start))).combine_chunks()
            for batch in block.replace_schema_metadata().to_batches():
                digest.update(batch.serialize())
        return digest.hexdigest()


def _open_digest(buffer: pa.Buffer) -> str:
    """Return what `KeptColumns` wrote."""
    return str(read_index(buffer, _MAGIC)["digest"])


def named_columns(config: DataConfig) -> tuple[str, ...] | None:
    """Return the columns that ``data.keep_columns`` names, None for all."""
    keep: str | list[str] = config.keep_columns
    return None if keep == ALL else tuple(dict.fromkeys([keep] if isinstance(keep, str) else keep))


def kept_columns(store: RowStore, config: DataConfig, record_columns: Sequence[str]) -> KeptColumns:
    """Return the columns of a dataset that ``data.keep_columns`` names.

    Args:
        record_columns: the columns of a record; an input column of the same name gets a prefix.

    Raises:
        InputError: a column does not exist, or its name in the output is another column's.
    """
    named = named_columns(config)
    columns = [name for name in store.columns if name in store.types] if named is None else named
    for name in columns:
        if name not in store.columns:
            raise InputError(
                f"data.keep_columns names {name}, which is not a column of {config.path}; it has "
                f"{', '.join(store.columns)}."
            )
    names = {name: f"{PREFIX}{name}" if name in record_columns else name for name in columns}
    for old, new in names.items():
        if old != new and (new in columns or new in record_columns):
            raise InputError(
                f"data.keep_columns: the input column {old} would be written as {new}, which {config.path} has as "
                f"well; rename one of them, or name the columns to keep without {old}."
            )
    if mixed := [name for name in columns if store.types[name] == MIXED]:
        logger.info(
            "Column(s) with values of several types stand in the output as JSON, which datasets decodes: %s.",
            ", ".join(mixed),
        )
    return KeptColumns(names=names, _store=store)
