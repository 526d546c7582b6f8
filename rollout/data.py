"""The rows of a dataset as prompts, each with an id of its own."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from glob import glob, has_magic
from pathlib import Path
from typing import Any, cast

import datasets

from rollout.arithmetic import DEFAULT_PROBLEMS, problems
from rollout.config import DataConfig
from rollout.errors import InputError

Message = dict[str, Any]
Prompt = str | list[Message] | list[int]
"""Text as it is, chat messages for the template, or token ids."""

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BATCH = 1000


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One row: its prompt, or the class and words of what is wrong with it."""

    index: int
    row_id: str
    prompt: Prompt | None
    columns: dict[str, Any]
    """All columns of the row where a reward reads them, else the prompt's alone."""
    error_class: str = ""
    error: str = ""


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

    def rows(self, start: int, stop: int) -> Iterator[PromptRow]:
        """Rows ``[start, stop)``."""
        for index, columns in enumerate(_dicts(self._dataset[start:stop]), start):
            yield _prompt_row(index, self.row_ids[index], columns, self._config)


def read_prompts(config: DataConfig, with_columns: bool = False) -> Prompts:
    """Read a dataset and give every row its id.

    Args:
        with_columns: keep all columns, for a reward; else the prompt and the id alone are read.

    Raises:
        InputError: there is nothing to read, or it cannot be read as prompts; the message says what to change.
    """
    dataset = _limited(_load(config), config)
    _check_columns(dataset, config)
    if not with_columns:
        dataset = dataset.select_columns([c for c in (config.prompt_column, config.id_column) if c is not None])
    row_ids: list[str] = []
    ordinals: Counter[str] = Counter()
    digest = hashlib.sha256()
    chat_row = None
    for columns in (row for batch in dataset.iter(_BATCH) for row in _dicts(batch)):
        prompt = _canonical(_without_nulls(columns[config.prompt_column]))
        row_id = _given_id(columns[config.id_column], len(row_ids), config) if config.id_column else None
        if row_id is None:
            name = hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()
            row_id = f"{name}-{ordinals[name]}"
            ordinals[name] += 1
        digest.update(f"{row_id}\0{_canonical(columns) if with_columns else prompt}\n".encode())
        if chat_row is None and _is_chat(_prompt_row(0, row_id, columns, config).prompt):
            chat_row = row_id
        row_ids.append(row_id)
    _refuse_duplicates(row_ids, config)
    if config.system_prompt is not None and chat_row is None:
        raise InputError(
            "data.system_prompt goes before chat messages, and the prompts are plain: set data.as_chat=true as well."
        )
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


def _prompt_row(index: int, row_id: str, columns: dict[str, Any], config: DataConfig) -> PromptRow:
    value = columns[config.prompt_column]
    if value is None:
        return PromptRow(index, row_id, None, columns, "bad_prompt", "The prompt is null.")
    if value in ("", []):
        return PromptRow(index, row_id, None, columns, "empty_prompt", "The prompt is empty.")
    if isinstance(value, str):
        return PromptRow(index, row_id, _with_system(value, config), columns)
    if isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        if min(value) < 0:
            return PromptRow(index, row_id, None, columns, "bad_prompt", f"The token id {min(value)} is negative.")
        return PromptRow(index, row_id, value, columns)
    if isinstance(value, list) and all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in value):
        return PromptRow(index, row_id, _with_system(_without_nulls(value), config), columns)
    error = f"The prompt {_short(value)} is neither text, nor chat messages with roles, nor token ids."
    return PromptRow(index, row_id, None, columns, "bad_prompt", error)


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


# The dataset


def _load(config: DataConfig) -> datasets.Dataset:
    # The job draws its own progress, and says in one sentence what failed.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    path = config.path
    if path.startswith("builtin:"):
        if path != "builtin:arithmetic":
            raise InputError(f"data.path is {path}, but the one builtin dataset is builtin:arithmetic.")
        return datasets.Dataset.from_list(problems(config.limit or DEFAULT_PROBLEMS))
    if "://" in path:
        return _read(config, path, [path], builder=_builder(path))
    if has_magic(path) and not Path(path).exists():
        files = sorted(file for file in glob(path, recursive=True) if Path(file).is_file())
        if not files:
            raise InputError(f"data.path={path} matches no file.")
        return _read(config, path, files, builder=_builder(files[0]))
    if Path(path).is_dir():
        if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
            return _split(_read(config, path, [], builder=None), config)
        raise InputError(
            f"data.path={path} is a folder that save_to_disk did not write; name the files in it, e.g. "
            f"data.path='{path.rstrip('/')}/*.parquet'."
        )
    if Path(path).exists():
        return _read(config, path, [path], builder=_builder(path))
    if Path(path).suffix in (*_BUILDERS, ".gz") or not _HUB_ID.fullmatch(path):
        raise InputError(f"data.path={path} does not exist.")
    return _read(config, path, [], builder=path)


def _builder(path: str) -> str:
    suffix = Path(path.removesuffix(".gz")).suffix
    if suffix not in _BUILDERS:
        raise InputError(f"data.path={path} ends in none of {', '.join(_BUILDERS)}, the files that can be read.")
    return _BUILDERS[suffix]


def _read(config: DataConfig, path: str, files: list[str], builder: str | None) -> Any:
    if files and all(Path(file).exists() and Path(file).stat().st_size == 0 for file in files):
        raise InputError(f"data.path={path} is empty.")
    try:
        if builder is None:
            return datasets.load_from_disk(path)
        if files:
            # A file has one split, whatever it is called.
            return datasets.load_dataset(builder, data_files={config.split: files}, split=config.split)
        return datasets.load_dataset(builder, name=config.name, split=config.split)
    except Exception as error:
        for file in files if builder == "json" else []:
            _name_bad_line(file)
        raise InputError(f"data.path={path} cannot be read: {_innermost(error)}") from error


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") + "." if lines else f"{type(error).__name__}."


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


def _split(read: datasets.Dataset | datasets.DatasetDict, config: DataConfig) -> datasets.Dataset:
    if isinstance(read, datasets.Dataset):
        return read
    if config.split not in read:
        raise InputError(f"data.split={config.split} is not in {config.path}, which has {', '.join(sorted(read))}.")
    return cast(datasets.Dataset, read[config.split])


def _limited(dataset: datasets.Dataset, config: DataConfig) -> datasets.Dataset:
    if len(dataset) == 0:
        raise InputError(f"data.path={config.path} holds no rows.")
    return dataset if config.limit is None else dataset.select(range(min(config.limit, len(dataset))))


def _check_columns(dataset: datasets.Dataset, config: DataConfig) -> None:
    for key, column in (("data.prompt_column", config.prompt_column), ("data.id_column", config.id_column)):
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
