"""Read the input rows of a dataset as prompts, each with a unique id."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rollout.config.schema import DataConfig
from rollout.data.columns import OPTIONAL_COLUMNS, ColumnChoice, columns_read, resolve
from rollout.data.dataset_row import DatasetRow, Prompt, as_length_hint, dataset_row, is_chat
from rollout.data.kept_columns import KeptColumns, kept_columns, named_columns
from rollout.data.reading import load
from rollout.data.row_ids import RowIds
from rollout.data.row_survey import as_number, canonical, survey
from rollout.data.sources import find_source
from rollout.data.stored_rows import StoredRows
from rollout.errors import InputError
from rollout.records import RECORD_COLUMNS
from rollout.tokenization.prompt import Chat

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompts:
    """All input rows of a run, in dataset order; they are read from disk on demand."""

    row_ids: RowIds
    content: str
    """Digest of the ids, the prompts and, with a reward, all columns: what the results depend on."""
    chat_row: str | None
    """Id of the first input row that needs a chat template; None if no row does."""
    kept: KeptColumns
    """The input columns that stand in the output."""
    _rows: StoredRows
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
        ids = self.row_ids.within(start, stop)
        for row_id, (index, columns) in zip(ids, self._rows.read(start, stop), strict=True):
            row = dataset_row(index, row_id, columns, self._config)
            if not _is_unicode(row.prompt):
                row = replace(row, prompt=None, error_class="bad_prompt", error="The prompt is not valid Unicode.")
            if row.error_class:
                row = replace(row, error=f"{row.error.rstrip('.')} ({self._rows.store.place(index)}).")
            yield row if hints is None else replace(row, length_hint=as_length_hint(as_number(columns[hints])))


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
    rows = StoredRows(store=store, names=names, nested=nested)
    found = survey(rows, config, for_reward=choice.for_reward)
    if found.chat_row is None:
        _refuse_chat_settings(config)
        _warn_about_template_columns(names)
    return Prompts(
        row_ids=found.ids,
        content=found.content,
        chat_row=found.chat_row,
        kept=kept,
        _rows=rows,
        _config=config,
    )


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


def _is_unicode(prompt: Prompt | None) -> bool:
    """Return whether all text of a prompt can be encoded; lone surrogates cannot."""
    if prompt is None or (isinstance(prompt, list) and not is_chat(prompt)):
        return True
    text = prompt if isinstance(prompt, str) else canonical(prompt.messages if isinstance(prompt, Chat) else prompt)
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
