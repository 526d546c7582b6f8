"""Read the input rows of a dataset as prompts, each with a unique id."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from typing import Any

import datasets

from rollout.config.schema import DataConfig
from rollout.data.columns import OPTIONAL_COLUMNS, ColumnChoice, columns_read
from rollout.data.dataset_row import DatasetRow, as_length_hint, dataset_row, is_chat, without_nulls
from rollout.data.kept_columns import KeptColumns, kept_columns, named_columns
from rollout.data.sources import find_source, load, refuse
from rollout.errors import InputError
from rollout.records import RECORD_COLUMNS

_ROWS_PER_READ = 1000


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
    _dataset: datasets.Dataset
    _config: DataConfig

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def hinted(self) -> bool:
        """Whether the dataset has a column of length hints."""
        return self._config.length_hint_column is not None

    def rows(self, start: int, stop: int) -> Iterator[DatasetRow]:
        """Yield the input rows ``[start, stop)``."""
        for index, columns in enumerate(_rows_of(self._dataset[start:stop]), start):
            row = dataset_row(index, self.row_ids[index], columns, self._config)
            column = self._config.length_hint_column
            yield row if column is None else replace(row, length_hint=as_length_hint(columns[column]))


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
    source = find_source(config.path)
    dataset = load(source, config)
    _check_columns(dataset, config)
    if config.limit is not None:
        dataset = dataset.select(range(min(config.limit, len(dataset))))
    choice = ColumnChoice(
        read=columns_read(config),
        optional=OPTIONAL_COLUMNS,
        kept=named_columns(config),
        for_reward=with_columns,
    )
    kept = kept_columns(dataset, config, record_columns)
    # Columns that are kept alone are copied without being decoded, when a shard is written.
    dataset = dataset.select_columns(replace(choice, kept=()).chosen(dataset.column_names))
    try:
        prompts = _with_ids(dataset, kept, config, choice)
    except UnicodeDecodeError as error:
        # Arrow does not check the encoding of text; it is decoded only when rows become Python values.
        refuse(source, error)
    _refuse_duplicates(prompts.row_ids, config)
    if config.system_prompt is not None and prompts.chat_row is None:
        raise InputError(
            "data.system_prompt needs chat messages, but no prompt has any: set data.as_chat=true as well."
        )
    return prompts


def _with_ids(dataset: datasets.Dataset, kept: KeptColumns, config: DataConfig, choice: ColumnChoice) -> Prompts:
    row_ids: list[str] = []
    ordinals: Counter[str] = Counter()
    digest = hashlib.sha256()
    chat_row = None
    for columns in (row for batch in dataset.iter(_ROWS_PER_READ) for row in _rows_of(batch)):
        prompt = _canonical(without_nulls(columns[config.prompt_column]))
        row_id = _given_id(columns[config.id_column], len(row_ids), config) if config.id_column else None
        if row_id is None:
            prompt_hash = hashlib.blake2b(prompt.encode(errors="surrogatepass"), digest_size=8).hexdigest()
            row_id = f"{prompt_hash}-{ordinals[prompt_hash]}"
            ordinals[prompt_hash] += 1
        content = _canonical(columns) if choice.for_reward else prompt
        digest.update(f"{row_id}\0{content}\n".encode(errors="surrogatepass"))
        if chat_row is None and is_chat(dataset_row(len(row_ids), row_id, columns, config).prompt):
            chat_row = row_id
        row_ids.append(row_id)
    return Prompts(
        row_ids=row_ids,
        content=digest.hexdigest(),
        chat_row=chat_row,
        kept=kept,
        _dataset=dataset,
        _config=config,
    )


def _rows_of(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch of columns."""
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _canonical(value: object) -> str:
    """Format a value as JSON that is the same in every process, for digests."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=_json_default)


def _json_default(value: object) -> str:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    # The repr of other objects, such as images, may hold a memory address, which differs between processes.
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else type(value).__name__


def _given_id(value: object, index: int, config: DataConfig) -> str:
    if value is None or value == "":
        raise InputError(
            f"Input row {index} (counted from 0) has no value in data.id_column={config.id_column}; give every "
            "input row an id, or set data.id_column=null."
        )
    return str(value)


def _refuse_duplicates(row_ids: Sequence[str], config: DataConfig) -> None:
    first: dict[str, int] = {}
    for index, row_id in enumerate(row_ids):
        if first.setdefault(row_id, index) != index:
            raise InputError(
                f"Input rows {first[row_id]} and {index} (counted from 0) have the same id {row_id!r} in "
                f"data.id_column={config.id_column}; make ids unique, or set data.id_column=null."
            )


def _check_columns(dataset: datasets.Dataset, config: DataConfig) -> None:
    for key, column in columns_read(config).items():
        if column not in dataset.column_names:
            raise InputError(
                f"{key}={column} is not a column of {config.path}, which has {', '.join(dataset.column_names)}."
            )
    feature = dataset.features[config.prompt_column]
    if not _may_hold_prompts(feature):
        dtype = getattr(feature, "dtype", type(feature).__name__)
        raise InputError(
            f"data.prompt_column={config.prompt_column} holds {dtype} values, but prompts are text, lists of chat "
            "messages or lists of token ids."
        )
    if config.length_hint_column is not None:
        hints = dataset.features[config.length_hint_column]
        dtype = getattr(hints, "dtype", type(hints).__name__)
        if not isinstance(hints, datasets.Value) or not dtype.startswith(("int", "uint", "float")):
            raise InputError(
                f"data.length_hint_column={config.length_hint_column} holds {dtype} values, but length hints are "
                "numbers of tokens."
            )


def _may_hold_prompts(feature: object) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("string", "large_string")
    if type(feature).__name__ == "Json":
        # A column of mixed types: `dataset_row` checks each value.
        return True
    item = getattr(feature, "feature", None)
    if isinstance(item, datasets.Value):
        return item.dtype == "null" or str(item.dtype).startswith(("int", "uint"))
    return isinstance(item, dict) or type(item).__name__ == "Json"
