"""Load the dataset that ``data.path`` names, and explain failures down to the line."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NoReturn, cast

import datasets

from rollout.arithmetic import DEFAULT_PROBLEMS, problems
from rollout.config.schema import DataConfig
from rollout.errors import InputError, shorten
from rollout.models.errors import first_line

BUILTIN = "builtin:"
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Source:
    """What ``data.path`` refers to on this machine."""

    path: str
    builder: str | None
    """Argument of ``load_dataset``: a file format or the id of a hub dataset; None for a builtin or a saved folder."""
    files: tuple[str, ...] = ()


def find_source(path: str) -> Source:
    """Find what a path refers to.

    Raises:
        InputError: the path does not exist, or has a format that cannot be read.
    """
    path = os.path.expanduser(path)
    if path.startswith(BUILTIN):
        if path != "builtin:arithmetic":
            raise InputError(f"data.path is {path}, but the only builtin dataset is builtin:arithmetic.")
        return Source(path, None)
    if "://" in path:
        return Source(path, _builder(path), (path,))
    if Path(path).is_dir():
        if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
            return Source(path, None)
        raise InputError(
            f"data.path={path} is a folder that save_to_disk did not write; give the files in it, e.g. "
            f"data.path='{path.rstrip('/')}/*.parquet'."
        )
    if Path(path).exists():
        return Source(path, _builder(path), (path,))
    if has_magic(path):
        files = sorted(file for file in glob(path, recursive=True) if Path(file).is_file())
        if not files:
            raise InputError(f"data.path={path} matches no file.")
        return Source(path, _builder(files[0]), tuple(files))
    if Path(path).suffix in (*_BUILDERS, ".gz") or not _HUB_ID.fullmatch(path):
        raise InputError(f"data.path={path} does not exist.")
    return Source(path, path)


def _builder(path: str) -> str:
    suffix = Path(path.removesuffix(".gz")).suffix
    if suffix not in _BUILDERS:
        raise InputError(f"data.path={path} ends in none of the readable formats {', '.join(_BUILDERS)}.")
    return _BUILDERS[suffix]


def load(source: Source, config: DataConfig) -> datasets.Dataset:
    """Load the dataset of a source.

    Raises:
        InputError: the dataset cannot be read, has no input rows, or lacks the split.
    """
    # The job draws its own progress and reports failures in one sentence.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if source.path.startswith(BUILTIN):
        return datasets.Dataset.from_list(problems(config.limit or DEFAULT_PROBLEMS))
    if source.files and all(Path(file).exists() and Path(file).stat().st_size == 0 for file in source.files):
        raise InputError(f"data.path={source.path} is empty.")
    try:
        dataset = _split(_read(source, config), config)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  # readers raise many kinds of errors; each means bad input
        refuse(source, error)
    if len(dataset) == 0:
        raise InputError(f"data.path={source.path} holds no input rows.")
    return dataset


def _read(source: Source, config: DataConfig) -> Any:
    if source.builder is None:
        try:
            return datasets.load_from_disk(source.path)
        except IndexError as error:
            # load_from_disk indexes the folder's first data file, which an empty dataset does not have.
            raise InputError(f"data.path={source.path} holds no input rows.") from error
    if source.files:
        # The files form one split, which takes the configured name.
        files = {config.split: list(source.files)}
        return datasets.load_dataset(source.builder, data_files=files, split=config.split)
    return datasets.load_dataset(source.builder, name=config.name, split=config.split)


def _split(loaded: datasets.Dataset | datasets.DatasetDict, config: DataConfig) -> datasets.Dataset:
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if config.split not in loaded:
        raise InputError(f"data.split={config.split} is not in {config.path}, which has {', '.join(sorted(loaded))}.")
    return cast(datasets.Dataset, loaded[config.split])


def refuse(source: Source, error: Exception) -> NoReturn:
    """Raise an `InputError` that explains why a source cannot be read, naming the bad line of a JSON file."""
    if source.builder == "json":
        for file in source.files:
            _refuse_bad_line(file)
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    raise InputError(f"data.path={source.path} cannot be read: {first_line(cause)}.") from error


def _refuse_bad_line(path: str) -> None:
    """Look for a bad line in a JSON or JSONL file.

    Raises:
        InputError: a line is bad, or the file has none; the message names the file and the line.
    """
    if not Path(path).exists():
        return
    rows = 0
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.lstrip()[:1] == b"[":
                _refuse_bad_array(path, line + file.read())
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                reason = getattr(error, "msg", "it is not UTF-8")
                raise InputError(
                    f"Line {number} of {path} is not a complete JSON object ({reason}); fix or remove it."
                ) from error
            if not isinstance(row, dict):
                shown = shorten(json.dumps(row), longest=40)
                raise InputError(f"Line {number} of {path} is {shown}, but must be a JSON object.")
            rows += 1
    if not rows:
        raise InputError(f"The file {path} holds no input rows.")


def _refuse_bad_array(path: str, content: bytes) -> None:
    try:
        json.loads(content)
    except ValueError as error:
        line, reason = getattr(error, "lineno", 1), getattr(error, "msg", "it is not UTF-8")
        raise InputError(f"Line {line} of {path} breaks the JSON array ({reason}); fix it.") from error
