"""Read the rows of a source once into a store that every later access maps."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NoReturn, cast

import datasets
import pyarrow as pa

from rollout.arithmetic import DEFAULT_PROBLEMS, problems
from rollout.config.schema import DataConfig
from rollout.data.arrow_formats import ARROW_FORMATS, as_batches, read_arrow_format
from rollout.data.cache import SMALL_BYTES, cached, digest_of
from rollout.data.columns import ColumnChoice
from rollout.data.data_files import DataFile
from rollout.data.row_store import RowStore, RowWriter
from rollout.data.sources import Source
from rollout.data.text_formats import Batch, read_text_format
from rollout.errors import InputError
from rollout.models.errors import first_line

logger = logging.getLogger(__name__)

_VERSION = 3
"""Raised when files of an earlier version are to be read anew."""
_IN_MEMORY_BYTES = SMALL_BYTES
"""Files of less than this are read into memory by each process, larger ones into the cache by one of them."""


def load(source: Source, config: DataConfig, choice: ColumnChoice) -> RowStore:
    """Load the rows of a source.

    Raises:
        InputError: it cannot be read, or has no input rows; the message names the file and the line.
    """
    # The job draws its own progress and reports failures in one sentence.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        store = _load(source, config, choice)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  # readers raise many kinds of errors; each means bad input
        _refuse(f"data.path={source.path}", error)
    if not len(store):
        raise InputError(f"data.path={source.path} holds no input rows.")
    return store


def _load(source: Source, config: DataConfig, choice: ColumnChoice) -> RowStore:
    if source.kind == "builtin":
        rows = problems(config.limit or DEFAULT_PROBLEMS)
        return _of_table(pa.Table.from_pylist(rows), choice, config)
    if source.kind == "saved":
        return _of_dataset(_saved(source, config), choice, config)
    if source.kind == "hub":
        if not config.streaming and config.limit is None:
            loaded = datasets.load_dataset(source.path, name=config.name, split=config.split)
            _warn_of_types(source.path, loaded.info)
            return _of_dataset(loaded, choice, config)
        builder = datasets.load_dataset_builder(source.path, name=config.name)
        _warn_of_types(source.path, builder.info)
        name = _name([source.path, builder.hash, builder.config_id, config.split], config, choice)
        store = _cached(name, config, lambda writer: _stream(builder, config, choice, writer))
        return replace(store, name=name)
    if sum(file.expanded_bytes() for file in source.files) < _IN_MEMORY_BYTES:
        sink = pa.BufferOutputStream()
        _write(sink, lambda writer: _read_files(source, config, choice, writer))
        return RowStore.from_buffer(sink.getvalue())
    name = _name([file.identity() for file in source.files], config, choice)
    store = _cached(name, config, lambda writer: _read_files(source, config, choice, writer))
    return replace(store, name=name)


def _name(identity: list[Any], config: DataConfig, choice: ColumnChoice) -> str:
    """Return a name for the rows that a source of this identity holds."""
    return digest_of([_VERSION, identity, config.limit, config.prompt_column, choice.key()])


def _saved(source: Source, config: DataConfig) -> datasets.Dataset:
    try:
        loaded = datasets.load_from_disk(source.path)
    except IndexError as error:
        # load_from_disk indexes the folder's first data file, which an empty dataset does not have.
        raise InputError(f"data.path={source.path} holds no input rows.") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if config.split not in loaded:
        raise InputError(f"data.split={config.split} is not in {config.path}, which has {', '.join(sorted(loaded))}.")
    return cast(datasets.Dataset, loaded[config.split])


def _of_dataset(dataset: datasets.Dataset, choice: ColumnChoice, config: DataConfig) -> RowStore:
    # The fingerprint of a saved dataset stands in a file of its own, so its data files are named as well.
    files = [DataFile(file["filename"], "arrow").identity() for file in dataset.cache_files]
    identity = [dataset._fingerprint, files]
    if dataset._indices is not None:
        dataset = dataset.flatten_indices()
    store = _of_table(dataset.data.table, choice, config, dataset.features.to_dict())
    return replace(store, name=_name(identity, config, choice)) if files else store


def _of_table(
    table: pa.Table, choice: ColumnChoice, config: DataConfig, features: dict[str, Any] | None = None
) -> RowStore:
    if table.num_rows:
        choice.check(config.path, table.column_names)
        choice.check_prompt_type(config.path, table.schema)
    held = table.select(choice.chosen(table.column_names))
    held = held if config.limit is None else held.slice(0, config.limit)
    return RowStore.of_table(held, table.column_names, features or {})


def _warn_of_types(path: str, info: Any) -> None:
    """Warn where ``datasets`` has given types to values that are text in the files."""
    if info.builder_name == "csv":
        logger.warning(
            "The files of %s are CSV, whose values datasets types (00123 becomes 123, NA becomes null); "
            "data.path='hf://datasets/%s/*.csv' reads them as they stand.",
            path,
            path,
        )


def _stream(builder: Any, config: DataConfig, choice: ColumnChoice, writer: RowWriter) -> None:
    """Write the rows of a dataset of the Hub as they come, without downloading its files."""
    rows = builder.as_streaming_dataset(split=config.split)
    if config.limit is None:
        logger.info("Reading all rows of %s as they come; data.limit reads only so many.", config.path)
    else:
        rows = rows.take(config.limit)
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for batch in as_batches(table.select(choice.chosen(table.column_names)), table.column_names):
            _append(batch, writer)


def _read_files(source: Source, config: DataConfig, choice: ColumnChoice, writer: RowWriter) -> None:
    empty: list[str] = []
    for file in source.files:
        left = None if config.limit is None else config.limit - writer.rows
        if left == 0:
            break
        before = writer.rows
        writer.begin_file(file.name)
        found: dict[str, None] = {}
        try:
            for batch in _batches(file, config, choice, left):
                found.update(dict.fromkeys(batch.columns))
                if file.format in ARROW_FORMATS:
                    choice.check_prompt_type(file.path, batch.table.schema)
                _append(batch, writer)
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001  # a file cut short, a page that does not decompress, no permission
            _refuse(file.path, error)
        if writer.rows == before:
            empty.append(file.name)
        else:
            choice.check(file.path, list(found))
    if empty and writer.rows:
        logger.warning("%d of %d files hold no rows: %s.", len(empty), len(source.files), ", ".join(empty[:5]))


def _batches(file: DataFile, config: DataConfig, choice: ColumnChoice, limit: int | None) -> Iterator[Batch]:
    if file.format in ARROW_FORMATS:
        return read_arrow_format(file, choice.chosen, limit)
    return read_text_format(file, choice.chosen, limit, once=choice.named(), text_column=config.prompt_column)


def _append(batch: Batch, writer: RowWriter) -> None:
    writer.add_columns(batch.columns)
    writer.add_features(batch.features)
    writer.write(batch.table, batch.types)


def _write(sink: Any, produce: Callable[[RowWriter], None]) -> None:
    writer = RowWriter(sink)
    produce(writer)
    writer.close()


def _cached(name: str, config: DataConfig, produce: Callable[[RowWriter], None]) -> RowStore:
    """Open the store of this name in the cache; write it first if no process has yet."""
    return cached(f"{name}.rows", config.path, RowStore.from_buffer, lambda sink: _write(sink, produce))


def _refuse(what: str, error: BaseException) -> NoReturn:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if getattr(cause, "errno", None) == errno.ENOSPC:
        raise InputError(
            f"The cache folder {datasets.config.HF_DATASETS_CACHE} has no space left for the rows that are read: set "
            "HF_DATASETS_CACHE to a folder that has."
        ) from error
    raise InputError(f"{what} cannot be read: {first_line(cause)}.") from error
