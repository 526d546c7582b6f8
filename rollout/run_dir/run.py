"""The directory of a run and its ``run.json``: the fingerprint, the partition into shards, and the attempts."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.config.schema import Config
from rollout.errors import InputError
from rollout.record_columns import SCHEMA
from rollout.run_dir.atomic_write import write_atomically, write_text_atomically
from rollout.run_dir.fingerprint import Fingerprint, describe, differences
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.record_table import describe_columns
from rollout.run_dir.shard_locks import locked

FORMAT = 2
"""Version of the directory's layout; incremented when earlier directories can no longer be read."""
SHARDS_PER_WORKER = 8
"""Least number of shards per worker when there are several, so that a slow worker does not delay the end."""
_PACKAGES = ("rollout", "torch", "transformers", "accelerate", "datasets", "pyarrow", "numpy", "hydra-core")


@dataclass(frozen=True, slots=True)
class RunDir:
    """A run as ``run.json`` describes it, seen by one attempt."""

    paths: RunPaths
    fingerprint: Fingerprint
    rows: int
    """Input rows."""
    samples: int
    """Samples of each input row."""
    rows_per_shard: int
    format: str
    columns: dict[str, str]
    """Name and Arrow type of each column of the shards, in their order."""
    dtype: str
    """The dtype that ``model.dtype`` resolved to in the first attempt; later attempts must use the same."""
    attempt: int
    """Number of earlier attempts."""

    @property
    def shards(self) -> int:
        return math.ceil(self.rows / self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """Return the indices of a shard's input rows."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def committed_samples(self) -> int:
        """Count the samples in committed shards."""
        return self.samples_of(int(path.stem) for path in self.paths.shards.glob("*.json") if path.stem.isdigit())

    def begun_samples(self) -> int:
        """Count the samples in shards that a worker has begun and not committed, killed workers among them."""
        return self.samples_of(int(path.stem) for path in self.paths.work.glob("*.lock") if path.stem.isdigit())

    def samples_of(self, shards: Iterable[int]) -> int:
        """Count the samples of some shards."""
        return self.samples * sum(len(self.shard_rows(shard)) for shard in shards)

    def complete(self) -> bool:
        """Return whether all shards are committed."""
        return all(self.paths.manifest(shard).exists() for shard in range(self.shards))

    def clear_work(self) -> None:
        """Remove the locks and part files of a complete run; several workers may do this at once."""
        shutil.rmtree(self.paths.work, ignore_errors=True)


def prepare_folder(folder: str) -> RunPaths:
    """Create ``output.dir`` if needed, and check that it is writable and holds a run or no shards.

    Raises:
        InputError: the folder cannot be written, or holds shards without a run.
    """
    paths = RunPaths(Path(folder).expanduser())
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=paths.root):
            pass
    except OSError as error:
        raise InputError(f"output.dir={folder} cannot be written ({error.strerror}): choose another folder.") from error
    # Check run.json last: another worker may begin the run between the two checks.
    if paths.shards.exists() and any(paths.shards.iterdir()) and not paths.run.exists():
        raise InputError(f"output.dir={folder} has files in shards/ but no run.json: choose another folder.")
    return paths


def existing_run(paths: RunPaths, fingerprint: Fingerprint) -> RunDir | None:
    """Return the run that the folder holds, None if it holds none.

    Raises:
        InputError: the run has another fingerprint, or cannot be read.
    """
    if not paths.run.exists():
        return None
    run = read_run(paths)
    # A run keeps the dates with which it began: a resume on the next day continues with the same prompts.
    fingerprint = fingerprint.dated(run.fingerprint.template_dates)
    if differences(run.fingerprint, fingerprint):
        raise InputError(
            f"output.dir={paths.root} holds a run with another fingerprint ({describe(run.fingerprint, fingerprint)}): "
            "choose another folder, or restore the earlier values."
        )
    return run


def read_run(paths: RunPaths) -> RunDir:
    """Return the run that a folder holds.

    Raises:
        InputError: the folder holds no run, or its ``run.json`` cannot be read.
    """
    stored = read_run_json(paths)
    try:
        return RunDir(
            paths=paths,
            fingerprint=Fingerprint(stored["fingerprint"]),
            rows=stored["rows"],
            samples=stored["samples"],
            rows_per_shard=stored["rows_per_shard"],
            format=stored["output_format"],
            columns=dict(stored["columns"]),
            dtype=stored["dtype"],
            attempt=len(stored["attempts"]) - 1,
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{paths.run} does not describe a run: {error!r}.") from error


def read_row_ids(paths: RunPaths) -> pa.ChunkedArray:
    """Read the ids of all input rows, in order.

    Raises:
        InputError: the ids cannot be read.
    """
    try:
        return pq.read_table(paths.rows).column("row_id")
    except (OSError, KeyError, pa.ArrowException) as error:
        raise InputError(f"{paths.rows}, the ids of the input rows, cannot be read: {error}.") from error


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
) -> RunDir:
    """Start a run in the folder, or resume the one it holds, and record this attempt.

    The first attempt decides the partition into shards; later ones keep it, whatever their number of workers.

    Args:
        schema: the columns of the shards.

    Raises:
        InputError: the folder holds a run with another fingerprint or dtype.
    """
    with locked(paths.run_lock):
        if existing_run(paths, fingerprint) is None:
            paths.shards.mkdir(exist_ok=True)
            table = pa.table({"row_id": pa.array(row_ids, pa.string())})
            # Written before run.json, whose presence means that the directory is usable.
            write_atomically(paths.rows, paths.temporary(paths.rows), lambda target: pq.write_table(table, target))
            dated = fingerprint.dated(template_dates)
            stored = _new_run_json(config, dated, rows=len(row_ids), dtype=dtype, workers=workers)
            stored["columns"] = describe_columns(schema, config.output.format)
        else:
            stored = read_run_json(paths)
        if stored["dtype"] != dtype:
            raise InputError(
                f"model.dtype={config.model.dtype} means {dtype} here, but the run in {paths.root} uses "
                f"{stored['dtype']}: set model.dtype={stored['dtype']}."
            )
        stored["attempts"].append(_attempt(config, attention, workers))
        write_text_atomically(paths.run, paths.temporary(paths.run), json.dumps(stored, indent=2) + "\n")
    return read_run(paths)


def read_run_json(paths: RunPaths) -> dict[str, Any]:
    """Read ``run.json``.

    Raises:
        InputError: the file does not exist, cannot be read, or has another format.
    """
    try:
        stored = json.loads(paths.run.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{paths.root} holds no run: it has no run.json.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{paths.run} cannot be read: {error}.") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise InputError(f"{paths.run} does not have format {FORMAT}, the only one that this version reads.")
    return stored


def _new_run_json(config: Config, fingerprint: Fingerprint, *, rows: int, dtype: str, workers: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "fingerprint": fingerprint.values,
        "digest": fingerprint.digest,
        "rows": rows,
        "samples": config.sampling.n,
        "rows_per_shard": choose_rows_per_shard(rows, config.output.rows_per_shard, workers),
        "output_format": config.output.format,
        "dtype": dtype,
        "config": asdict(config),
        "packages": {name: _installed_version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "attempts": [],
    }


def choose_rows_per_shard(rows: int, configured: int, workers: int) -> int:
    """Return the input rows per shard: as configured, or fewer so that several workers share them evenly."""
    return configured if workers == 1 else min(configured, math.ceil(rows / (SHARDS_PER_WORKER * workers)))


def _attempt(config: Config, attention: str, workers: int) -> dict[str, Any]:
    """Describe one attempt: the settings that may differ between attempts of a run."""
    model = {key: getattr(config.model, key) for key in ("device", "device_map", "tensor_parallel")}
    execution = {"batcher": asdict(config.batcher), "memory": asdict(config.memory), **model}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "workers": workers,
        "attention": attention,
        **execution,
    }


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
