"""Which columns of a dataset a job reads, keeps, and passes to a reward."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from difflib import get_close_matches
from typing import Any

import pyarrow as pa

from rollout.config.schema import DataConfig
from rollout.errors import InputError
from rollout.tokenization.template_columns import TEMPLATE_COLUMNS

_PROMPT_COLUMNS = (
    *("prompt", "messages", "conversations", "conversation", "prompts", "question", "instruction"),
    *("problem", "query", "input", "inputs", "text", "content"),
)
"""Names under which datasets have prompts, the likeliest first."""


@dataclass(frozen=True, slots=True)
class ColumnChoice:
    """The columns of a dataset that a job holds; all other columns are not even read."""

    read: dict[str, str]
    """Column by the configuration key that names it; such a column must exist."""
    optional: tuple[str, ...] = ()
    """Columns that are read where the dataset has them."""
    kept: tuple[str, ...] | None = ()
    """Columns that stand in the output; None for all."""
    for_reward: bool = False
    """Whether a reward reads all columns."""

    @property
    def all(self) -> bool:
        """Whether every column is held."""
        return self.for_reward or self.kept is None

    def chosen(self, available: Sequence[str]) -> list[str]:
        """Return the available columns that are held, in the dataset's order."""
        if self.all:
            return list(available)
        named = (*self.read.values(), *self.optional, *(self.kept or ()))
        wanted = {path[0] for name in named if (path := resolve(name, available))}
        return [name for name in available if name in wanted]

    def named(self) -> frozenset[str]:
        """Return the columns that the configuration reads, of which a file must not have two."""
        return frozenset((*self.read.values(), *self.optional))

    def check(self, where: str, available: Sequence[str]) -> None:
        """Refuse a file or dataset that lacks a column which a configuration key names.

        Raises:
            InputError: a column is missing; the message names the key, the file and the columns it has.
        """
        for key, column in self.read.items():
            if not resolve(column, available):
                likely = _likely(key, column, available)
                hint = f": write {_assignment(key, likely)}" if likely else ""
                raise InputError(f"{key}={column} is not a column of {where}, which has {_listed(available)}{hint}.")

    def check_prompt_type(self, where: str, schema: pa.Schema) -> None:
        """Refuse a file of typed columns whose prompt column has a type that no prompt has.

        Raises:
            InputError: so it is; the message names the file and the type.
        """
        column = self.read["data.prompt_column"]
        if column in schema.names and not _may_hold_prompts(kind := schema.field(column).type):
            raise InputError(
                f"data.prompt_column={column} holds {kind} values in {where}, but prompts are text, lists of chat "
                "messages or lists of token ids."
            )

    def key(self) -> list[Any]:
        """Return what tells this choice from others, as JSON can hold it."""
        return list(astuple(self))


def _likely(key: str, column: str, available: Sequence[str]) -> str | None:
    """Return the column that is probably meant by the name of one that does not exist."""
    spelled = {name.strip().casefold(): name for name in reversed(available)}
    if near := get_close_matches(column.strip().casefold(), spelled, n=1, cutoff=0.8):
        return spelled[near[0]]
    if key != "data.prompt_column":
        return None
    if {"custom_id", "body"} <= spelled.keys():
        return "body.messages"
    return next((spelled[name] for name in _PROMPT_COLUMNS if name in spelled), None)


def _assignment(key: str, value: str) -> str:
    """Format a word of the command line, with the quotes that a name with spaces or the like needs."""
    return f"{key}={value}" if re.fullmatch(r"[\w.-]+", value) else f"'{key}=\"{value}\"'"


def _may_hold_prompts(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = kind.value_type
        return any(test(item) for test in (pa.types.is_null, pa.types.is_integer, pa.types.is_struct, is_json))
    return any(test(kind) for test in (pa.types.is_null, *_TEXT_TYPES, is_json))


def is_json(kind: pa.DataType) -> bool:
    """Return whether values of a type are JSON text that stands for what it says."""
    return isinstance(kind, pa.JsonType)


_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def _listed(names: Sequence[str]) -> str:
    # Quotes show spaces at the ends of a name.
    shown = [name if name == name.strip() != "" else repr(name) for name in names[:50]]
    return ", ".join(shown) + (", ..." if len(names) > 50 else "") if names else "no column"


def resolve(name: str, available: Iterable[str]) -> list[str]:
    """Return the column that a name refers to, then the fields inside it; empty if there is no such column.

    ``body.messages`` is the column of this name, or if there is none, the field ``messages`` of the column ``body``.
    """
    available = set(available)
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if (column := ".".join(parts[:count])) in available:
            return [column, *parts[count:]]
    return []


def field_of(columns: dict[str, Any], path: list[str]) -> Any:
    """Return the value that a row has at a path of `resolve`; None if an object on the way lacks the field.

    An object may be stored as its JSON text.
    """
    value: Any = columns
    for name in path:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                return None
        value = value.get(name) if isinstance(value, dict) else None
    return value


def columns_read(config: DataConfig) -> dict[str, str]:
    """Return the columns that a configuration names, by the key that names each.

    A feature that reads a further column adds its key here; that column must then exist, and is read by `read_prompts`.
    """
    named = {
        "data.prompt_column": config.prompt_column,
        "data.id_column": config.id_column,
        "data.length_hint_column": config.length_hint_column,
        **{f"data.sampling_columns.{name}": column for name, column in (config.sampling_columns or {}).items()},
    }
    return {key: column for key, column in named.items() if column is not None}


#: Columns that are read by themselves where the dataset has them.
OPTIONAL_COLUMNS = TEMPLATE_COLUMNS
