"""The directory of a run and its ``run.json``: the fingerprint, and the partition into shards."""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollout.config.schema import Config
from rollout.errors import InputError
from rollout.record_columns import SCHEMA
from rollout.run_dir.attempts import begin_attempt, this_launch
from rollout.run_dir.claims import committed
from rollout.run_dir.file_system import LOCAL, FileSystem, contents, names_in, put_first, see_afresh
from rollout.run_dir.file_system_checks import check_file_system
from rollout.run_dir.fingerprint import Fingerprint, describe, differences
from rollout.run_dir.partition import rows_per_shard
from rollout.run_dir.paths import RunPaths, numbers
from rollout.run_dir.record_table import describe_columns
from rollout.run_dir.row_ids_file import check_row_ids, write_row_ids
from rollout.run_dir.sealed_json import seal, unseal
from rollout.run_dir.versions import changes, installed_versions

logger = logging.getLogger(__name__)

FORMAT = 3
"""Version of the directory's layout; incremented when earlier directories can no longer be read."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """A run as ``run.json`` describes it, seen by one attempt."""

    paths: RunPaths
    fingerprint: Fingerprint
    rows: int
    """Input rows."""
    rows_sha256: str
    """Digest of the file with their ids."""
    samples: int
    """Samples of each input row."""
    rows_per_shard: int
    format: str
    columns: dict[str, str]
    """Name and Arrow type of each column of the shards, in their order."""
    dtype: str
    """The dtype that ``model.dtype`` resolved to in the first attempt; later attempts must use the same."""
    files: FileSystem = LOCAL
    """How its files are reached."""
    attempt: int = 0
    """Number of the launch that sees it."""

    @property
    def shards(self) -> int:
        return math.ceil(self.rows / self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """Return the indices of a shard's input rows."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def committed(self) -> set[int]:
        """Return the committed shards."""
        return {shard for shard in committed(self.files, self.paths) if shard < self.shards}

    def begun(self) -> set[int]:
        """Return the shards that workers have claimed, killed ones among them."""
        return numbers(names_in(self.files, self.paths.claims))

    def samples_of(self, shards: Iterable[int]) -> int:
        """Count the samples of some shards."""
        return self.samples * sum(len(self.shard_rows(shard)) for shard in shards)

    def complete(self) -> bool:
        """Return whether all shards are committed."""
        return len(self.committed()) == self.shards

    def clear_work(self) -> None:
        """Remove the claims and part files of a complete run; several workers may do this at once."""
        # A worker may have died before it flushed the names that the others saw.
        self.files.sync_folder(self.paths.shards)
        self.files.remove_folder(self.paths.work)


def prepare_folder(folder: str, files: FileSystem = LOCAL) -> RunPaths:
    """Create ``output.dir`` if needed, and check that it is writable and holds a run or no shards.

    Raises:
        InputError: the folder cannot be written, or holds shards without a run.
        OSError: it holds a run, but cannot be written now.
    """
    paths = RunPaths(Path(folder).expanduser())
    try:
        files.make_folder(paths.root)
        # In this folder itself: a machine that has just changed a folder sees what others did there, over NFS as well.
        check_file_system(files, paths.root, f".{secrets.token_hex(4)}")
        _flush_name(files, paths.root)
    except OSError as error:
        if files.exists(paths.run):
            raise
        raise InputError(f"output.dir={folder} cannot be written ({error.strerror}): choose another folder.") from error
    # Check run.json last: another worker may begin the run between the two checks.
    if names_in(files, paths.shards) and not files.exists(paths.run):
        # It may have begun the run just now, on another machine.
        see_afresh(files, paths.root)
        if not files.exists(paths.run):
            raise InputError(f"output.dir={folder} has files in shards/ but no run.json: choose another folder.")
    return paths


def _flush_name(files: FileSystem, folder: Path) -> None:
    """Flush a folder's own name, with which all in it would be lost."""
    try:
        files.sync_folder(folder.absolute().parent)
    except PermissionError:
        # One may write into a folder that one may not read; then its file system must do without.
        logger.debug("The name of %s could not be flushed: the folder above it cannot be read.", folder)


def existing_run(paths: RunPaths, fingerprint: Fingerprint, files: FileSystem = LOCAL) -> RunDir | None:
    """Return the run that the folder holds, None if it holds none.

    Raises:
        InputError: the run has another fingerprint, or cannot be read.
    """
    if not files.exists(paths.run):
        return None
    run = read_run(paths, files)
    fingerprint = fingerprint.resuming(run.fingerprint)
    if differences(run.fingerprint, fingerprint):
        raise InputError(
            f"output.dir={paths.root} holds a run with another fingerprint ({describe(run.fingerprint, fingerprint)}): "
            "choose another folder, or restore the earlier values."
        )
    return run


def read_run(paths: RunPaths, files: FileSystem = LOCAL, attempt: int = 0) -> RunDir:
    """Return the run that a folder holds.

    Args:
        attempt: number of the launch that reads it.

    Raises:
        InputError: the folder holds no run, or its ``run.json`` cannot be read.
    """
    stored = read_run_json(paths, files)
    try:
        run = RunDir(
            paths=paths,
            fingerprint=Fingerprint(stored["fingerprint"]),
            rows=stored["rows"],
            rows_sha256=stored["rows_sha256"],
            samples=stored["samples"],
            rows_per_shard=stored["rows_per_shard"],
            format=stored["output_format"],
            columns=dict(stored["columns"]),
            dtype=stored["dtype"],
            files=files,
            attempt=attempt,
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{paths.run} does not describe a run: {error!r}.") from error
    sizes = {name: getattr(run, name) for name in ("rows", "samples", "rows_per_shard")}
    if odd := {name: size for name, size in sizes.items() if type(size) is not int or size < 1}:
        raise InputError(f"{paths.run} does not describe a run: its sizes are {odd}.")
    return run


def open_run(
    paths: RunPaths,
    config: Config,
    fingerprint: Fingerprint,
    row_ids: Sequence[str],
    *,
    schema: pa.Schema = SCHEMA,
    dtype: str,
    attention: str,
    workers: int,
    template_dates: Mapping[str, str],
    token: str,
    files: FileSystem = LOCAL,
    processes: int = 1,
    loading_seconds: float = 0.0,
) -> RunDir:
    """Start a run in the folder, or resume the one it holds, and record this attempt.

    The first attempt decides the partition into shards; later ones keep it, whatever their number of workers.

    Args:
        schema: the columns of the shards.
        token: text that no other launch has, for the names of temporary files.
        processes: of this launch.
        loading_seconds: that it has taken so far.

    Raises:
        InputError: the folder holds a run with another fingerprint or dtype.
    """

    def describe_run() -> dict[str, Any]:
        dated = fingerprint.dated(template_dates)
        described = _new_run_json(config, dated, rows=len(row_ids), dtype=dtype, workers=workers)
        return {**described, "columns": describe_columns(schema, config.output.format)}

    run = begin_run(paths, fingerprint, row_ids, describe_run, token, files)
    if run.dtype != dtype:
        raise InputError(
            f"model.dtype={config.model.dtype} means {dtype} here, but the run in {paths.root} uses "
            f"{run.dtype}: set model.dtype={run.dtype}."
        )
    launch = {"processes": processes, "loading_seconds": round(loading_seconds, 3)}
    return with_attempt(run, {**_attempt(config, attention, workers), **launch}, token)


def begin_run(
    paths: RunPaths,
    fingerprint: Fingerprint,
    row_ids: Sequence[str],
    describe_run: Callable[[], dict[str, Any]],
    token: str,
    files: FileSystem = LOCAL,
) -> RunDir:
    """Return the run that the folder holds, having begun it if there is none.

    Args:
        describe_run: returns the content of ``run.json``, which gets the digest of the ids' file as well.
        token: text that no other launch has, for the names of temporary files.

    Raises:
        InputError: the folder holds a run with another fingerprint.
    """
    run = existing_run(paths, fingerprint, files)
    if run is None:
        files.make_folder(paths.shards)
        # Written before run.json, whose presence means that the directory is usable.
        sha256 = write_row_ids(files, paths.rows, paths.temporary(paths.rows, token), row_ids)
        stored = {**describe_run(), "rows_sha256": sha256}
        put_first(files, paths.run, paths.temporary(paths.run, token), contents(seal(stored)))
        # Another launch may have been first; then its run is joined, if it is the same.
        run = existing_run(paths, fingerprint, files)
        assert run is not None
    restore_row_ids(run, row_ids, token)
    return run


def with_attempt(run: RunDir, described: Mapping[str, Any], token: str) -> RunDir:
    """Record an attempt, and say which versions are others than those with which the run began.

    Args:
        described: what the attempt runs with.
        token: text that no other launch has, for the name of a temporary file.
    """
    attempt = begin_attempt(run.files, run.paths, described, token)
    for sentence in changes(read_run_json(run.paths, run.files)["packages"], described["packages"]):
        logger.warning("%s", sentence)
    return replace(run, attempt=attempt)


def restore_row_ids(run: RunDir, row_ids: Sequence[str], token: str) -> None:
    """Write the file of ids again if it is gone or damaged; the fingerprint says that these are the run's ids.

    Args:
        token: text that no other launch has, for the name of a temporary file.
    """
    path = run.paths.rows
    try:
        check_row_ids(path, run.rows_sha256, run.files)
    except InputError as error:
        logger.warning("%s It is written again.", error)
        if write_row_ids(run.files, path, run.paths.temporary(path, token), row_ids) != run.rows_sha256:
            logger.warning("%s differs from the file with which the run began, as another version wrote that.", path)


def read_run_json(paths: RunPaths, files: FileSystem = LOCAL) -> dict[str, Any]:
    """Read ``run.json``.

    Raises:
        InputError: the file does not exist, cannot be read, is damaged, or has another format.
    """
    try:
        stored = unseal(files.read(paths.run))
    except FileNotFoundError as error:
        raise InputError(f"{paths.root} holds no run: it has no run.json.") from error
    except (OSError, ValueError) as error:
        if _earlier_format(files, paths):
            raise InputError(
                f"{paths.run} does not have format {FORMAT}, the only one that this version reads: finish the run with "
                "the version that began it, or choose another folder."
            ) from error
        raise InputError(f"{paths.run} cannot be read: {error}.") from error
    if stored.get("format") != FORMAT:
        raise InputError(f"{paths.run} does not have format {FORMAT}, the only one that this version reads.")
    return stored


def _earlier_format(files: FileSystem, paths: RunPaths) -> bool:
    """Return whether ``run.json`` is of an earlier version, which did not seal it."""
    try:
        stored = json.loads(files.read(paths.run))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(stored, dict) and stored.get("format") in range(1, FORMAT)


def _new_run_json(config: Config, fingerprint: Fingerprint, *, rows: int, dtype: str, workers: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "fingerprint": fingerprint.values,
        "digest": fingerprint.digest,
        "rows": rows,
        "samples": config.sampling.n,
        "rows_per_shard": rows_per_shard(config, rows, workers),
        "output_format": config.output.format,
        "dtype": dtype,
        "config": asdict(config),
        "packages": installed_versions(),
    }


def _attempt(config: Config, attention: str, workers: int) -> dict[str, Any]:
    """Describe one attempt: the settings that may differ between attempts of a run."""
    model = {key: getattr(config.model, key) for key in ("device", "device_map", "tensor_parallel", "batch_invariant")}
    execution = {"batcher": asdict(config.batcher), "memory": asdict(config.memory), **model}
    return {**this_launch(workers), "attention": attention, **execution}
