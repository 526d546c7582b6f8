"""Read the input rows of a dataset as prompts, each with a unique id."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from rollout.config.schema import DataConfig
from rollout.data.columns import OPTIONAL_COLUMNS, ColumnChoice, columns_read, field_of, resolve
from rollout.data.dataset_row import DatasetRow, Prompt, as_length_hint, dataset_row, is_chat, without_nulls
from rollout.data.kept_columns import KeptColumns, kept_columns, named_columns
from rollout.data.reading import load
from rollout.data.row_params import given_params
from rollout.data.row_store import RowStore
from rollout.data.sources import find_source
from rollout.errors import InputError, shorten
from rollout.records import RECORD_COLUMNS
from rollout.tokenization.prompt import Chat

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompts:
    """All input rows of a run, in dataset order; they are read from disk on demand."""

    row_ids: list[str]
    content: str
    """Digest of the ids, the prompts and, with a reward, all columns: what the results depend on."""
    chat_row: str | None
    """Id of the first input row that needs a chat template; None if no row does."""
    kept: KeptColumns
    """The input columns that stand in the output."""
    _rows: _Rows
    _config: DataConfig

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def hinted(self) -> bool:
        """Whether the dataset has a column of length hints."""
        return self._config.length_hint_column is not None

    def rows(self, start: int, stop: int) -> Iterator[DatasetRow]:
        """Yield the input rows ``[start, stop)``; the error of one that has no prompt names its file and line."""
        hints = self._config.length_hint_column
        for index, columns in self._rows.read(start, stop):
            row = dataset_row(index, self.row_ids[index], columns, self._config)
            if not _is_unicode(row.prompt):
                row = replace(row, prompt=None, error_class="bad_prompt", error="The prompt is not valid Unicode.")
            if row.error_class:
                row = replace(row, error=f"{row.error.rstrip('.')} ({self._rows.store.place(index)}).")
            yield row if hints is None else replace(row, length_hint=as_length_hint(_as_number(columns[hints])))


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a store, with the fields that dotted names refer to as further columns."""

    store: RowStore
    names: list[str]
    """Columns that rows have: all for a reward, else those that the configuration names."""
    nested: dict[str, list[str]]
    """Column and fields by each dotted name that is no column's."""

    def read(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        index = start
        for rows in self.store.batches(self.names, start, stop):
            for columns in rows:
                for name, path in self.nested.items():
                    columns[name] = field_of(columns, path)
                yield index, columns
                index += 1


def read_prompts(
    config: DataConfig, with_columns: bool = False, record_columns: Sequence[str] = RECORD_COLUMNS
) -> Prompts:
    """Read a dataset and give every input row its id.

    Args:
        with_columns: give rows all columns, for a reward; otherwise those that the configuration names.
        record_columns: names that input columns cannot have in the output.

    Raises:
        InputError: the dataset is missing, empty or does not hold prompts; the message says what to change.
    """
    source = find_source(config)
    choice = ColumnChoice(
        read=columns_read(config),
        optional=OPTIONAL_COLUMNS,
        kept=named_columns(config),
        for_reward=with_columns,
    )
    store = load(source, config, choice)
    kept = kept_columns(store, config, record_columns)
    # Columns that are kept alone are copied without being decoded, when a shard is written.
    names = replace(choice, kept=()).chosen([name for name in store.columns if name in store.types])
    paths = {name: resolve(name, store.columns) for name in choice.read.values()}
    nested = {name: path for name, path in paths.items() if len(path) > 1}
    prompts = _with_ids(_Rows(store=store, names=names, nested=nested), kept, config, choice)
    _refuse_duplicates(prompts.row_ids, config)
    if prompts.chat_row is None:
        _refuse_chat_settings(config)
        _warn_about_template_columns(names)
    return prompts


def _refuse_chat_settings(config: DataConfig) -> None:
    """Refuse settings that only chats have, for prompts that are none."""
    for name in ("system_prompt", "chat_template", "chat_template_kwargs", "tools"):
        if getattr(config, name):
            raise InputError(
                f"data.{name} needs chat messages, but no prompt has any: set data.as_chat=true as well, or unset it."
            )


def _warn_about_template_columns(columns: Sequence[str]) -> None:
    """Warn about columns for the chat template that change no prompt."""
    for name in OPTIONAL_COLUMNS:
        if name in columns:
            logger.warning(
                "The column %s is not used, because no prompt is a chat: set data.as_chat=true if it is meant for the "
                "chat template.",
                name,
            )


def _with_ids(rows: _Rows, kept: KeptColumns, config: DataConfig, choice: ColumnChoice) -> Prompts:
    row_ids: list[str] = []
    ordinals: Counter[str] = Counter()
    digest = hashlib.sha256()
    chat_row = None
    prompts, numbers = 0, 0
    hints = config.length_hint_column
    template_columns = [name for name in OPTIONAL_COLUMNS if name in rows.names]
    for index, columns in rows.read(0, len(rows.store)):
        value = columns[config.prompt_column]
        prompt = _canonical(without_nulls(value))
        if config.id_column:
            row_id = _given_id(columns[config.id_column], index, rows.store, config)
        else:
            prompt_hash = hashlib.blake2b(prompt.encode(errors="surrogatepass"), digest_size=8).hexdigest()
            row_id = f"{prompt_hash}-{ordinals[prompt_hash]}"
            ordinals[prompt_hash] += 1
        content = _canonical(columns) if choice.for_reward else prompt
        if template_columns and not choice.for_reward:
            content += _canonical_of_template(columns, template_columns)
        if config.sampling_columns:
            content += _canonical(given_params(columns, config.sampling_columns))
        digest.update(f"{row_id}\0{content}\n".encode(errors="surrogatepass"))
        if chat_row is None and _may_be_chat(value, config):
            chat_row = row_id if is_chat(dataset_row(index, row_id, columns, config).prompt) else None
        if not prompts and _may_hold_prompt(value):
            prompts = 1
        if hints is not None:
            numbers += _check_length_hint(columns[hints], index, rows.store, config)
        row_ids.append(row_id)
    if not prompts:
        _refuse_prompts(rows, config)
    if hints is not None and not numbers:
        raise InputError(f"data.length_hint_column={hints} holds no value in any row, but length hints are numbers.")
    return Prompts(
        row_ids=row_ids,
        content=digest.hexdigest(),
        chat_row=chat_row,
        kept=kept,
        _rows=rows,
        _config=config,
    )


def _canonical_of_template(columns: Mapping[str, Any], names: Sequence[str]) -> str:
    """Format what a row has for the chat template alone."""
    given = {name: value for name in names if (value := without_nulls(columns.get(name))) is not None}
    return _canonical(given) if given else ""


def _canonical(value: object) -> str:
    """Format a value as JSON that is the same in every process, for digests."""
    return _CANONICAL.encode(value)


def _json_default(value: object) -> str:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID | timedelta):
        return str(value)
    # The repr of other objects, such as images, may hold a memory address, which differs between processes.
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else type(value).__name__


_CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=_json_default)


def _given_id(value: object, index: int, store: RowStore, config: DataConfig) -> str:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise InputError(
            f"Input row {index} (counted from 0; {store.place(index)}) has no value in "
            f"data.id_column={config.id_column}; give every input row an id, or set data.id_column=null."
        )
    if isinstance(value, list | dict | bytes):
        raise InputError(
            f"{store.place(index)} has {_shown(value)} in data.id_column={config.id_column}, but ids are texts or "
            "numbers."
        )
    text = str(value)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(
            f"{store.place(index)} has {_shown(value)} in data.id_column={config.id_column}, which is not valid "
            "Unicode: mend that id."
        )
    return text


def _refuse_duplicates(row_ids: Sequence[str], config: DataConfig) -> None:
    if len(set(row_ids)) == len(row_ids):
        return
    first: dict[str, int] = {}
    for index, row_id in enumerate(row_ids):
        if first.setdefault(row_id, index) != index:
            raise InputError(
                f"Input rows {first[row_id]} and {index} (counted from 0) have the same id {row_id!r} in "
                f"data.id_column={config.id_column}; make ids unique, or set data.id_column=null."
            )


def _may_be_chat(value: object, config: DataConfig) -> bool:
    """Return whether `dataset_row` may make chat messages of a value: of plain text it does so only if asked."""
    return config.as_chat or not isinstance(value, str) or value.lstrip()[:1] in ("[", "{")


def _may_hold_prompt(value: object) -> bool:
    """Return whether a value has the type of a prompt, whatever it holds."""
    if not isinstance(value, list):
        return isinstance(value, str)
    kinds = set(map(type, value))
    return kinds in (set(), {int}, {dict})


def _refuse_prompts(rows: _Rows, config: DataConfig) -> None:
    """Refuse a column in which no row has a prompt, naming the first value that is something else."""
    for index, columns in rows.read(0, len(rows.store)):
        if (value := columns[config.prompt_column]) is not None:
            raise InputError(
                f"data.prompt_column={config.prompt_column} holds no prompt in any row, but prompts are text, lists of "
                f"chat messages or lists of token ids; {rows.store.place(index)} has {_shown(value)}."
            )
    holder = rows.nested.get(config.prompt_column, [config.prompt_column])[0]
    inside = next(
        (columns[holder] for _, columns in rows.read(0, len(rows.store)) if columns[holder] is not None), None
    )
    shown = "" if inside is None else f"; the first value of the column {holder} is {_shown(inside)}"
    raise InputError(
        f"data.prompt_column={config.prompt_column} holds null in every row, but prompts are text, lists of chat "
        f"messages or lists of token ids{shown}."
    )


def _is_unicode(prompt: Prompt | None) -> bool:
    """Return whether all text of a prompt can be encoded; lone surrogates cannot."""
    if prompt is None or (isinstance(prompt, list) and not is_chat(prompt)):
        return True
    text = prompt if isinstance(prompt, str) else _canonical(prompt.messages if isinstance(prompt, Chat) else prompt)
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_number(value: object) -> float | None:
    """Return a number, also one that is written as text, as all values of a CSV file are; else None."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _check_length_hint(value: object, index: int, store: RowStore, config: DataConfig) -> bool:
    """Return whether a row has a length hint.

    Raises:
        InputError: it has something else than a number there.
    """
    if value is None or value == "":
        return False
    if _as_number(value) is None:
        raise InputError(
            f"data.length_hint_column={config.length_hint_column} holds {_shown(value)} in {store.place(index)}, but "
            "length hints are numbers of tokens."
        )
    return True


def _shown(value: object) -> str:
    """Describe a value in a message by its type and its beginning."""
    kinds = {str: "the text", bool: "the truth value", int: "the number", float: "the number"}
    return f"{kinds.get(type(value), f'the {type(value).__name__}')} {shorten(repr(value), longest=40)}"
