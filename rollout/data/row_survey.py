"""What one pass over all input rows finds: their ids, and the digest of what the results depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import pyarrow as pa

from rollout.config.schema import DataConfig
from rollout.data.cache import SMALL_BYTES, UnwritableCache, cached, digest_of
from rollout.data.columns import OPTIONAL_COLUMNS
from rollout.data.dataset_row import dataset_row, is_chat, without_nulls
from rollout.data.row_ids import Checksummed, RowIds, RowIdWriter
from rollout.data.row_naming import GivenIds, Named, Naming, PromptIds, described
from rollout.data.row_params import given_params
from rollout.data.row_store import RowStore, read_index, write_index
from rollout.data.stored_rows import StoredRows
from rollout.errors import InputError

logger = logging.getLogger(__name__)

_VERSION = 1
"""Raised when what is kept of an earlier version is to be found anew."""
_MAGIC = b"rowids01"
_BLOCK_BYTES = 16 << 20
"""About so many bytes of rows are decoded at a time; as Python's values they take several times as much."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What a pass over all input rows finds."""

    ids: RowIds
    content: str
    """Digest of the ids, the prompts and, with a reward, all columns."""
    chat_row: str | None
    """Id of the first input row that needs a chat template; None if no row does."""


def survey(rows: StoredRows, config: DataConfig, for_reward: bool) -> Survey:
    """Return what a pass over all input rows finds; of a large dataset it is kept, and later processes map it.

    Args:
        for_reward: all columns are part of the content.

    Raises:
        InputError: rows have no ids, equal ones, no prompts, or length hints that are no numbers.
    """

    def write(sink: pa.NativeFile) -> None:
        _write_survey(rows, config, for_reward, sink)

    if rows.store.name is not None and rows.store.bytes >= SMALL_BYTES:
        try:
            return cached(f"{_key(rows, config, for_reward)}.ids", config.path, _open_survey, write)
        except (UnwritableCache, OSError) as error:  # no folder, or no space
            logger.warning("The ids of the input rows cannot be kept, and are found anew at every start: %s", error)
    sink = pa.BufferOutputStream()
    write(sink)
    return _open_survey(sink.getvalue())


def _key(rows: StoredRows, config: DataConfig, for_reward: bool) -> str:
    """Name all that the survey depends on."""
    read = [config.prompt_column, config.id_column, config.length_hint_column, config.sampling_columns]
    return digest_of([_VERSION, rows.store.name, rows.names, read, config.as_chat, config.system_prompt, for_reward])


def _open_survey(buffer: pa.Buffer) -> Survey:
    """Open what `_write_survey` wrote, without copying the ids.

    Raises:
        ValueError: the buffer holds something else, or is damaged.
    """
    index = read_index(buffer, _MAGIC)
    stream = buffer.slice(0, index["bytes"])
    # Damaged ids would name the records of this run and key their noise.
    if zlib.crc32(memoryview(stream)) != index["crc32"]:
        raise ValueError("its checksum differs")
    ids = pa.ipc.open_stream(stream).read_all().column(0)
    return Survey(ids=RowIds(ids), content=index["content"], chat_row=index["chat_row"])


def _write_survey(rows: StoredRows, config: DataConfig, for_reward: bool, sink: pa.NativeFile) -> None:
    checked = Checksummed(sink)
    writer = RowIdWriter(checked)
    found = _pass(rows, config, for_reward, writer)
    writer.close()
    index = {"bytes": checked.bytes, "crc32": checked.crc32, "content": found.content, "chat_row": found.chat_row}
    write_index(sink, index, _MAGIC)


class _Found(NamedTuple):
    content: str
    chat_row: str | None


def _pass(rows: StoredRows, config: DataConfig, for_reward: bool, writer: RowIdWriter) -> _Found:
    digest = hashlib.sha256()
    chat_row = None
    prompts, numbers = 0, 0
    hints = config.length_hint_column
    template_columns = [name for name in OPTIONAL_COLUMNS if name in rows.names]
    naming: Naming = GivenIds(rows, config) if config.id_column else PromptIds()
    start = 0
    for block in rows.blocks(0, len(rows), size=rows.store.rows_within(_BLOCK_BYTES)):
        values = [columns[config.prompt_column] for columns in block]
        texts = [canonical(without_nulls(value)) for value in values]
        for index, (columns, text) in enumerate(zip(block, texts, strict=True), start):
            naming.add(Named(index, columns, text))
            if hints is not None:
                numbers += _check_length_hint(columns[hints], index, rows.store, config)
        ids = naming.ids()
        writer.write(ids)
        for index, (row_id, value, text, columns) in enumerate(zip(ids, values, texts, block, strict=True), start):
            content = canonical(columns) if for_reward else text
            if template_columns and not for_reward:
                content += _canonical_of_template(columns, template_columns)
            if config.sampling_columns:
                content += canonical(given_params(columns, config.sampling_columns))
            digest.update(f"{row_id}\0{content}\n".encode(errors="surrogatepass"))
            if chat_row is None and _may_be_chat(value, config):
                chat_row = row_id if is_chat(dataset_row(index, row_id, columns, config).prompt) else None
        if not prompts and any(map(_may_hold_prompt, values)):
            prompts = 1
        start += len(block)
    if not prompts:
        _refuse_prompts(rows, config)
    if hints is not None and not numbers:
        raise InputError(f"data.length_hint_column={hints} holds no value in any row, but length hints are numbers.")
    naming.refuse_duplicates()
    return _Found(digest.hexdigest(), chat_row)


def _canonical_of_template(columns: Mapping[str, Any], names: Sequence[str]) -> str:
    """Format what a row has for the chat template alone."""
    given = {name: value for name in names if (value := without_nulls(columns.get(name))) is not None}
    return canonical(given) if given else ""


def canonical(value: object) -> str:
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


def _may_be_chat(value: object, config: DataConfig) -> bool:
    """Return whether `dataset_row` may make chat messages of a value: of plain text it does so only if asked."""
    return config.as_chat or not isinstance(value, str) or value.lstrip()[:1] in ("[", "{")


def _may_hold_prompt(value: object) -> bool:
    """Return whether a value has the type of a prompt, whatever it holds."""
    if not isinstance(value, list):
        return isinstance(value, str)
    kinds = set(map(type, value))
    return kinds in (set(), {int}, {dict})


def _refuse_prompts(rows: StoredRows, config: DataConfig) -> None:
    """Refuse a column in which no row has a prompt, naming the first value that is something else."""
    for index, columns in rows.read(0, len(rows.store)):
        if (value := columns[config.prompt_column]) is not None:
            raise InputError(
                f"data.prompt_column={config.prompt_column} holds no prompt in any row, but prompts are text, lists of "
                f"chat messages or lists of token ids; {rows.store.place(index)} has {described(value)}."
            )
    holder = rows.nested.get(config.prompt_column, [config.prompt_column])[0]
    inside = next(
        (columns[holder] for _, columns in rows.read(0, len(rows.store)) if columns[holder] is not None), None
    )
    shown = "" if inside is None else f"; the first value of the column {holder} is {described(inside)}"
    raise InputError(
        f"data.prompt_column={config.prompt_column} holds null in every row, but prompts are text, lists of chat "
        f"messages or lists of token ids{shown}."
    )


def as_number(value: object) -> float | None:
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
    if as_number(value) is None:
        raise InputError(
            f"data.length_hint_column={config.length_hint_column} holds {described(value)} in {store.place(index)}, "
            "but length hints are numbers of tokens."
        )
    return True
