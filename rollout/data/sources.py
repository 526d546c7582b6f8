"""Reading a dataset from wherever ``data.path`` says, and naming what is to blame where that fails."""

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
from rollout.config import DataConfig
from rollout.errors import InputError

BUILTIN = "builtin:"
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Source:
    """What ``data.path`` means on this machine."""

    path: str
    builder: str | None
    """What `datasets` reads it with: the kind of its files, or the id of a hub dataset; None for a saved folder."""
    files: tuple[str, ...] = ()


def find_source(path: str) -> Source:
    """What a path means.

    Raises:
        InputError: there is nothing, or nothing that can be read.
    """
    path = os.path.expanduser(path)
    if path.startswith(BUILTIN):
        if path != "builtin:arithmetic":
            raise InputError(f"data.path is {path}, but the one builtin dataset is builtin:arithmetic.")
        return Source(path, None)
    if "://" in path:
        return Source(path, _builder(path), (path,))
    if Path(path).is_dir():
        if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
            return Source(path, None)
        raise InputError(
            f"data.path={path} is a folder that save_to_disk did not write; name the files in it, e.g. "
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
        raise InputError(f"data.path={path} ends in none of {', '.join(_BUILDERS)}, the files that can be read.")
    return _BUILDERS[suffix]


def load(source: Source, config: DataConfig) -> datasets.Dataset:
    """The dataset of a source.

    Raises:
        InputError: it cannot be read, has no rows, or not the split.
    """
    # The job draws its own progress, and says in one sentence what failed.
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
    except Exception as error:  # noqa: BLE001  # whatever it is, it came of reading this input
        refuse(source, error)
    if len(dataset) == 0:
        raise InputError(f"data.path={source.path} holds no rows.")
    return dataset


def _read(source: Source, config: DataConfig) -> Any:
    if source.builder is None:
        try:
            return datasets.load_from_disk(source.path)
        except IndexError as error:
            # It looks for the first of the folder's data files, and an empty dataset has none.
            raise InputError(f"data.path={source.path} holds no rows.") from error
    if source.files:
        # A file has one split, whatever it is called.
        files = {config.split: list(source.files)}
        return datasets.load_dataset(source.builder, data_files=files, split=config.split)
    return datasets.load_dataset(source.builder, name=config.name, split=config.split)


def _split(read: datasets.Dataset | datasets.DatasetDict, config: DataConfig) -> datasets.Dataset:
    if isinstance(read, datasets.Dataset):
        return read
    if config.split not in read:
        raise InputError(f"data.split={config.split} is not in {config.path}, which has {', '.join(sorted(read))}.")
    return cast(datasets.Dataset, read[config.split])


def refuse(source: Source, error: Exception) -> NoReturn:
    """Turn an error in reading a source into a sentence that names the line, where there is one to name."""
    for file in source.files if source.builder == "json" else ():
        _name_bad_line(file)
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    raise InputError(f"data.path={source.path} cannot be read: {lines[0].rstrip('.')}.") from error


def _name_bad_line(path: str) -> None:
    """Find the line of a JSONL file that is to blame.

    Raises:
        InputError: naming the file and the line.
    """
    if not Path(path).exists():
        return
    number = rows = 0
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.lstrip()[:1] == b"[":
                _name_bad_line_of_array(path, line + file.read())
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                reason = getattr(error, "msg", "it is not UTF-8")
                raise InputError(
                    f"Line {number} of {path} is not a whole JSON object ({reason}); mend or remove it."
                ) from error
            if not isinstance(row, dict):
                raise InputError(f"Line {number} of {path} is {_short(row)}, but must be a JSON object.")
            rows += 1
    if not rows:
        raise InputError(f"The file {path} holds no rows.")


def _name_bad_line_of_array(path: str, content: bytes) -> None:
    try:
        json.loads(content)
    except ValueError as error:
        line, reason = getattr(error, "lineno", 1), getattr(error, "msg", "it is not UTF-8")
        raise InputError(f"Line {line} of {path} breaks the JSON array ({reason}); mend it.") from error


def _short(row: object) -> str:
    text = json.dumps(row)
    return text if len(text) <= 40 else f"{text[:37]}..."
