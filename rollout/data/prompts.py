"""The rows of a dataset as prompts, each with an id of its own."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from typing import Any

import datasets

from rollout.config import DataConfig
from rollout.data.sources import find_source, load, refuse
from rollout.errors import InputError

Message = dict[str, Any]
Prompt = str | list[Message] | list[int]
"""Text as it is, chat messages for the template, or token ids."""

_BATCH = 1000


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """One row: its prompt, or the class and words of what is wrong with it."""

    index: int
    row_id: str
    prompt: Prompt | None
    columns: dict[str, Any]
    """All columns of the row where a reward reads them, else those that the configuration names."""
    error_class: str = ""
    error: str = ""
    length_hint: float | None = None
    """Tokens that its output is expected to have; None where the column has no positive number."""


@dataclass(frozen=True)
class Prompts:
    """All rows of a run, in the order of the dataset. They stay on disk until they are asked for."""

    row_ids: list[str]
    content: str
    """Digest of ids, prompts and what the reward reads: with another one, results are others."""
    chat_row: str | None
    """Id of the first row that needs a chat template, None where no row does."""
    _dataset: datasets.Dataset
    _config: DataConfig

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def hinted(self) -> bool:
        """Whether rows have length hints."""
        return self._config.length_hint_column is not None

    def rows(self, start: int, stop: int) -> Iterator[DatasetRow]:
        """Rows ``[start, stop)``."""
        for index, columns in enumerate(_dicts(self._dataset[start:stop]), start):
            row = _prompt_row(index, self.row_ids[index], columns, self._config)
            column = self._config.length_hint_column
            yield row if column is None else replace(row, length_hint=_hint(columns[column]))


def read_prompts(config: DataConfig, with_columns: bool = False) -> Prompts:
    """Read a dataset and give every row its id.

    Args:
        with_columns: keep all columns, for a reward; else those alone that the configuration names.

    Raises:
        InputError: there is nothing to read, or it cannot be read as prompts; the message says what to change.
    """
    source = find_source(config.path)
    dataset = load(source, config)
    _check_columns(dataset, config)
    if config.limit is not None:
        dataset = dataset.select(range(min(config.limit, len(dataset))))
    if not with_columns:
        columns = (config.prompt_column, config.id_column, config.length_hint_column)
        dataset = dataset.select_columns(list(dict.fromkeys(c for c in columns if c is not None)))
    try:
        prompts = _identified(dataset, config, with_columns)
    except UnicodeDecodeError as error:
        # Arrow reads text as it is; only here does it become strings.
        refuse(source, error)
    _refuse_duplicates(prompts.row_ids, config)
    if config.system_prompt is not None and prompts.chat_row is None:
        raise InputError(
            "data.system_prompt goes before chat messages, and the prompts are plain: set data.as_chat=true as well."
        )
    return prompts


def _identified(dataset: datasets.Dataset, config: DataConfig, with_columns: bool) -> Prompts:
    row_ids: list[str] = []
    ordinals: Counter[str] = Counter()
    digest = hashlib.sha256()
    chat_row = None
    for columns in (row for batch in dataset.iter(_BATCH) for row in _dicts(batch)):
        prompt = _canonical(_without_nulls(columns[config.prompt_column]))
        row_id = _given_id(columns[config.id_column], len(row_ids), config) if config.id_column else None
        if row_id is None:
            name = hashlib.blake2b(prompt.encode(errors="surrogatepass"), digest_size=8).hexdigest()
            row_id = f"{name}-{ordinals[name]}"
            ordinals[name] += 1
        content = _canonical(columns) if with_columns else prompt
        digest.update(f"{row_id}\0{content}\n".encode(errors="surrogatepass"))
        if chat_row is None and _is_chat(_prompt_row(0, row_id, columns, config).prompt):
            chat_row = row_id
        row_ids.append(row_id)
    return Prompts(row_ids, digest.hexdigest(), chat_row, dataset, config)


def _dicts(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _canonical(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=_plain)


def _plain(value: object) -> str:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    # Pictures and the like: their text may hold an address in memory, which no other process repeats.
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else type(value).__name__


# One row


def _prompt_row(index: int, row_id: str, columns: dict[str, Any], config: DataConfig) -> DatasetRow:
    value = columns[config.prompt_column]
    if value is None:
        return DatasetRow(index, row_id, None, columns, "bad_prompt", "The prompt is null.")
    if value in ("", []):
        return DatasetRow(index, row_id, None, columns, "empty_prompt", "The prompt is empty.")
    if isinstance(value, str):
        return DatasetRow(index, row_id, _with_system(value, config), columns)
    if isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        if min(value) < 0:
            return DatasetRow(index, row_id, None, columns, "bad_prompt", f"The token id {min(value)} is negative.")
        return DatasetRow(index, row_id, value, columns)
    if isinstance(value, list) and all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in value):
        return DatasetRow(index, row_id, _with_system(_without_nulls(value), config), columns)
    error = f"The prompt {_short(value)} is neither text, nor chat messages with roles, nor token ids."
    return DatasetRow(index, row_id, None, columns, "bad_prompt", error)


def _hint(value: float | None) -> float | None:
    return None if value is None or not 0 < value < math.inf else float(value)


def _without_nulls(value: Any) -> Any:
    """Arrow fills the fields that some messages have into all others, as nulls; templates test for presence."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(field) for key, field in value.items() if field is not None}
    return value


def _with_system(prompt: str | list[Message], config: DataConfig) -> str | list[Message]:
    if isinstance(prompt, str):
        if not config.as_chat:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if config.system_prompt is None or prompt[0]["role"] == "system":
        return prompt
    return [{"role": "system", "content": config.system_prompt}, *prompt]


def _is_chat(prompt: Prompt | None) -> bool:
    return isinstance(prompt, list) and isinstance(prompt[0], dict)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _given_id(value: object, row: int, config: DataConfig) -> str:
    if value is None or value == "":
        raise InputError(
            f"Row {row} (counted from 0) has no value in data.id_column={config.id_column}; give every row an id, "
            "or set data.id_column=null."
        )
    return str(value)


def _refuse_duplicates(row_ids: Sequence[str], config: DataConfig) -> None:
    first: dict[str, int] = {}
    for row, row_id in enumerate(row_ids):
        if first.setdefault(row_id, row) != row:
            raise InputError(
                f"Rows {first[row_id]} and {row} (counted from 0) have the same id {row_id!r} in "
                f"data.id_column={config.id_column}; make ids unique, or set data.id_column=null."
            )


def _check_columns(dataset: datasets.Dataset, config: DataConfig) -> None:
    for key, column in (
        ("data.prompt_column", config.prompt_column),
        ("data.id_column", config.id_column),
        ("data.length_hint_column", config.length_hint_column),
    ):
        if column is not None and column not in dataset.column_names:
            raise InputError(
                f"{key}={column} is no column of {config.path}, which has {', '.join(dataset.column_names)}."
            )
    feature = dataset.features[config.prompt_column]
    if not _may_hold_prompts(feature):
        kind = getattr(feature, "dtype", type(feature).__name__)
        raise InputError(
            f"data.prompt_column={config.prompt_column} holds {kind} values, but prompts are text, lists of chat "
            "messages or lists of token ids."
        )
    if config.length_hint_column is not None:
        hints = dataset.features[config.length_hint_column]
        kind = getattr(hints, "dtype", type(hints).__name__)
        if not isinstance(hints, datasets.Value) or not kind.startswith(("int", "uint", "float")):
            raise InputError(
                f"data.length_hint_column={config.length_hint_column} holds {kind} values, but hints are numbers of "
                "tokens."
            )


def _may_hold_prompts(feature: object) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("string", "large_string")
    if type(feature).__name__ == "Json":
        # Values of several types in one column: each row is judged for itself.
        return True
    item = getattr(feature, "feature", None)
    if isinstance(item, datasets.Value):
        return item.dtype == "null" or str(item.dtype).startswith(("int", "uint"))
    return isinstance(item, dict) or type(item).__name__ == "Json"
