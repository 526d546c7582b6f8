"""Find the data files of a folder that is laid out as dataset repositories of the Hub are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from rollout.data.data_files import FORMATS, DataFile, data_file, file_system, is_url
from rollout.errors import InputError
from rollout.models.errors import first_line

logger = logging.getLogger(__name__)

_EXTENSIONS = list(FORMATS)


def files_of_folder(folder: str, name: str | None, split: str) -> tuple[DataFile, ...]:
    """Return the files of one split of a folder, in order.

    ``configs`` in the YAML part of its README.md say which files are which split's, or else names such as
    ``train-00000-of-00002.parquet`` and ``test/part.jsonl`` do; where they do not, all files are the split ``train``.

    Args:
        name: one of the ``configs``; None for the default.

    Raises:
        InputError: the folder has no such configuration, split or data file.
    """
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns, sanitize_patterns

    base = folder if is_url(folder) else str(Path(folder).resolve())
    try:
        patterns = _configured(folder, name)
        found = sanitize_patterns(patterns) if patterns else get_data_patterns(base)
        by_split = DataFilesDict.from_patterns(found, base_path=base, allowed_extensions=_EXTENSIONS)
        runs = _runs_inside(folder)
        splits = {str(key): _outside(runs, files) for key, files in by_split.items()}
        if not patterns:
            every = DataFilesDict.from_patterns({"all": ["**"]}, base_path=base, allowed_extensions=_EXTENSIONS)
            _warn_of_others(folder, _outside(runs, every["all"]), splits)
    except (EmptyDatasetError, FileNotFoundError) as error:
        raise _no_file(folder) from error
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"data.path={folder} has a README.md whose configs are wrong: {first_line(error)}.") from error
    chosen = {key: _of_one_format(folder, files) for key, files in splits.items()}
    if split not in chosen:
        raise InputError(f"data.split={split} is not in {folder}, which has {', '.join(sorted(chosen))}.")
    if not chosen[split] and not patterns:
        raise _no_file(folder)
    if not chosen[split]:
        raise InputError(f"data.split={split} of {folder} has no file: its README.md names files that are not there.")
    return chosen[split]


def _runs_inside(folder: str) -> list[Path]:
    """Return the folders of runs below a local folder: the files of a run that is written there are no input."""
    if is_url(folder):
        return []
    found = (path.parent for path in Path(folder).resolve().rglob("run.json") if (path.parent / "shards").is_dir())
    return [run for run in found if run != Path(folder).resolve()]


def _outside(runs: list[Path], paths: Iterable[str]) -> list[str]:
    return [path for path in paths if not any(Path(path).is_relative_to(run) for run in runs)]


def _no_file(folder: str) -> InputError:
    return InputError(
        f"data.path={folder} is a folder in which no file can be read; readable are {', '.join(FORMATS)}."
    )


def _warn_of_others(folder: str, paths: list[str], splits: dict[str, list[str]]) -> None:
    """Warn of data files whose names put them into no split, while those of others do."""
    in_splits = {path for files in splits.values() for path in files}
    if others := [file.name for path in paths if path not in in_splits and (file := data_file(str(path))) is not None]:
        logger.warning(
            "The splits of %s by the names of its files are %s; of no split, and not read, are %s.",
            *(folder, ", ".join(splits), ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")),
        )


def _of_one_format(folder: str, paths: list[str]) -> tuple[DataFile, ...]:
    """Keep the files of the format that most files have: a licence in a folder of Parquet files is no data."""
    files = [file for path in dict.fromkeys(paths) if (file := data_file(str(path))) is not None]
    formats = Counter(file.format for file in files)
    if len(formats) > 1:
        # Text is what anything may be written in, so it counts only where nothing else is.
        main = max(formats, key=lambda kind: (kind != "txt", formats[kind]))
        left = [file.name for file in files if file.format != main]
        logger.warning(
            "Reading the %d .%s file(s) of %s, but not %s; name them in data.path to read those.",
            *(formats[main], main, folder, ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")),
        )
        files = [file for file in files if file.format == main]
    return tuple(files)


def _configured(folder: str, name: str | None) -> Any:
    """Return the ``data_files`` of a configuration in README.md; None if it has no configurations."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData

    configs = MetadataConfigs.from_dataset_card_data(DatasetCardData(**_front_matter(folder)))
    with_files = {key: config["data_files"] for key, config in configs.items() if config.get("data_files")}
    if not with_files:
        if name is not None:
            raise InputError(f"data.name={name} is not in {folder}, whose README.md has no configs; leave it out.")
        return None
    key = name or configs.get_default_config_name()
    if key not in with_files:
        names = ", ".join(with_files)
        if name is None:
            raise InputError(f"data.path={folder} has several configurations: set data.name to one of {names}.")
        raise InputError(f"data.name={name} is not in {folder}, which has {names}.")
    return with_files[key]


def _front_matter(folder: str) -> dict[str, Any]:
    """Return the YAML part of a folder's README.md."""
    try:
        if is_url(folder):
            fs, path = file_system(folder)
            text = fs.read_text(f"{path.rstrip('/')}/README.md", encoding="utf-8")
        else:
            text = (Path(folder) / "README.md").read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return {}
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    try:
        found = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except yaml.YAMLError as error:
        raise InputError(f"data.path={folder} has a README.md whose YAML is broken: {first_line(error)}.") from error
    return found if isinstance(found, dict) else {}
