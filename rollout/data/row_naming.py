"""How input rows get their ids: from a column, or from their prompts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from rollout.config.schema import DataConfig
from rollout.data.row_ids import HashCounter, Hashes, first_duplicate
from rollout.data.row_store import RowStore
from rollout.data.stored_rows import StoredRows
from rollout.errors import InputError, shorten


class Named(NamedTuple):
    """An input row that gets an id."""

    number: int
    columns: Mapping[str, Any]
    prompt: str
    """The prompt in the form that is hashed."""


class Naming(Protocol):
    """Gives ids to rows, block after block."""

    def add(self, row: Named) -> None:
        """Take the next row.

        Raises:
            InputError: the row has no id; the message names it.
        """

    def ids(self) -> list[str]:
        """Return the ids of the rows that were added since the last call."""

    def refuse_duplicates(self) -> None:
        """Refuse the first id that an earlier row has.

        Raises:
            InputError: there is one; the message names both rows.
        """


class PromptIds:
    """Ids made of the hash of each prompt and the number of equal ones before it."""

    def __init__(self) -> None:
        self._counter = HashCounter()
        self._hashes: list[bytes] = []

    def add(self, row: Named) -> None:
        self._hashes.append(hashlib.blake2b(row.prompt.encode(errors="surrogatepass"), digest_size=8).digest())

    def ids(self) -> list[str]:
        hashes, self._hashes = self._hashes, []
        before = self._counter.add(np.frombuffer(b"".join(hashes), np.uint64)).tolist()
        return [f"{prompt_hash.hex()}-{count}" for prompt_hash, count in zip(hashes, before, strict=True)]

    def refuse_duplicates(self) -> None:
        """Equal prompts have different numbers."""


class GivenIds:
    """Ids that a column holds."""

    def __init__(self, rows: StoredRows, config: DataConfig) -> None:
        self._rows = rows
        self._config = config
        self._ids: list[str] = []
        self._hashes: list[Hashes] = []

    def add(self, row: Named) -> None:
        self._ids.append(self._id(row.number, row.columns))

    def ids(self) -> list[str]:
        ids, self._ids = self._ids, []
        self._hashes.append(np.array([hash(row_id) for row_id in ids], np.int64).view(np.uint64))
        return ids

    def refuse_duplicates(self) -> None:
        same = first_duplicate(self._read, np.concatenate(self._hashes))
        if same is not None:
            raise InputError(
                f"Input rows {same[0]} and {same[1]} (counted from 0) have the same id {self._read(same[0])!r} in "
                f"data.id_column={self._config.id_column}; make ids unique, or set data.id_column=null."
            )

    def _read(self, index: int) -> str:
        ((_, columns),) = self._rows.read(index, index + 1)
        return self._id(index, columns)

    def _id(self, index: int, columns: Mapping[str, Any]) -> str:
        assert self._config.id_column is not None
        return _given_id(columns[self._config.id_column], index, self._rows.store, self._config)


def _given_id(value: object, index: int, store: RowStore, config: DataConfig) -> str:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise InputError(
            f"Input row {index} (counted from 0; {store.place(index)}) has no value in "
            f"data.id_column={config.id_column}; give every input row an id, or set data.id_column=null."
        )
    if isinstance(value, list | dict | bytes):
        raise InputError(
            f"{store.place(index)} has {described(value)} in data.id_column={config.id_column}, but ids are texts or "
            "numbers."
        )
    text = str(value)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(
            f"{store.place(index)} has {described(value)} in data.id_column={config.id_column}, which is not valid "
            "Unicode: mend that id."
        )
    return text


def described(value: object) -> str:
    """Describe a value in a message by its type and its beginning."""
    kinds = {str: "the text", bool: "the truth value", int: "the number", float: "the number"}
    return f"{kinds.get(type(value), f'the {type(value).__name__}')} {shorten(repr(value), longest=40)}"
