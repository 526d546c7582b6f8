"""Find what ``data.path`` names: a generated dataset, a saved one, one of the Hub, or data files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from rollout.config.schema import DataConfig
from rollout.data.data_files import FORMATS, DataFile, data_file, file_system, is_url
from rollout.data.data_folder import files_of_folder
from rollout.errors import InputError
from rollout.models.errors import first_line

BUILTIN = "builtin:"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Source:
    """What ``data.path`` refers to."""

    path: str
    kind: str
    """``builtin``, ``saved`` (a folder of save_to_disk), ``hub`` or ``files``."""
    files: tuple[DataFile, ...] = ()


def find_source(config: DataConfig) -> Source:
    """Find what a configuration's path refers to.

    Raises:
        InputError: the path does not exist, or has a format that cannot be read.
    """
    path = os.path.expanduser(config.path).removeprefix("file://")
    if path.startswith(BUILTIN):
        if path != "builtin:arithmetic":
            raise InputError(f"data.path is {path}, but the only builtin dataset is builtin:arithmetic.")
        return Source(path, "builtin")
    if is_url(path):
        return Source(path, "files", _remote_files(path, config))
    if Path(path).is_dir():
        if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
            return Source(path, "saved")
        return Source(path, "files", files_of_folder(path, config.name, config.split))
    if Path(path).exists():
        return Source(path, "files", (_readable(path, path),))
    if has_magic(path):
        return Source(path, "files", _all_readable(path, sorted(glob(path, recursive=True))))
    name = Path(path)
    if data_file(path) is not None or name.suffix in (".gz", ".zst", ".bz2", ".xz") or not _HUB_ID.fullmatch(path):
        raise InputError(f"data.path={path} does not exist.")
    return Source(path, "hub")


def _remote_files(url: str, config: DataConfig) -> tuple[DataFile, ...]:
    fs, path = file_system(url)
    try:
        if url.startswith(("http://", "https://")):
            return (_readable(url, url),)
        if has_magic(path):
            return _all_readable(url, [fs.unstrip_protocol(found) for found in sorted(fs.glob(path))])
        # `exists` and `isdir` would take any failure, such as a refused login, for a missing file.
        if fs.info(path)["type"] == "directory":
            return files_of_folder(url, config.name, config.split)
    except FileNotFoundError as error:
        raise InputError(f"data.path={url} does not exist.") from error
    except InputError:
        raise
    except Exception as error:  # each file system raises errors of its own
        raise InputError(f"data.path={url} cannot be read: {first_line(error)}.") from error
    return (_readable(url, url),)


def _all_readable(pattern: str, paths: list[str]) -> tuple[DataFile, ...]:
    files = [path for path in paths if is_url(path) or Path(path).is_file()]
    if not files:
        raise InputError(f"data.path={pattern} matches no file.")
    return tuple(_readable(path, pattern) for path in files)


def _readable(path: str, given: str) -> DataFile:
    file = data_file(path)
    if file is None:
        of = "" if path == given else f" of data.path={given}"
        raise InputError(
            f"{'data.path=' if path == given else ''}{path}{of} ends in none of the readable formats "
            f"{', '.join(FORMATS)}, of which text may be compressed as .gz, .zst, .bz2 or .xz."
        )
    return file
