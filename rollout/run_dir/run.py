"""A run's folder: what it is a run of, how its rows are cut into shards, and who worked on it."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.config import Config
from rollout.errors import InputError
from rollout.run_dir.atomic_write import write_whole
from rollout.run_dir.fingerprint import Fingerprint, describe, differences
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.shard_locks import locked

FORMAT = 1
"""Of ``run.json`` and all else in the folder; raised when a later version can no longer read an earlier one's."""
SHARDS_PER_WORKER = 8
"""With several workers there are at least so many shards for each, so that a slow one does not hold the end."""
_PACKAGES = ("rollout", "torch", "transformers", "accelerate", "datasets", "pyarrow", "numpy", "hydra-core")


@dataclass(frozen=True, slots=True)
class RunDir:
    """What ``run.json`` says, for one attempt."""

    paths: RunPaths
    fingerprint: Fingerprint
    rows: int
    samples: int
    """Samples of each row."""
    rows_per_shard: int
    format: str
    dtype: str
    """What ``model.dtype`` came to; ``auto`` depends on the machine, and a run keeps to one."""
    attempt: int
    """Number of earlier attempts."""

    @property
    def shards(self) -> int:
        return math.ceil(self.rows / self.rows_per_shard)

    def span(self, shard: int) -> range:
        """The rows of a shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def committed_samples(self) -> int:
        """Samples in committed shards."""
        manifests = self.paths.shards.glob("*.json")
        return self.samples * sum(len(self.span(int(path.stem))) for path in manifests if path.stem.isdigit())

    def complete(self) -> bool:
        return all(self.paths.manifest(shard).exists() for shard in range(self.shards))

    def clear_work(self) -> None:
        """Remove locks and part files of a complete run; several workers may do so at once."""
        shutil.rmtree(self.paths.work, ignore_errors=True)


def prepare(folder: str) -> RunPaths:
    """Make sure that ``output.dir`` can be written and is a run's folder, or empty.

    Raises:
        InputError: it is not.
    """
    paths = RunPaths(Path(folder).expanduser())
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=paths.root):
            pass
    except OSError as error:
        raise InputError(f"output.dir={folder} cannot be written ({error.strerror}): choose another folder.") from error
    # In this order: another worker may begin the run between the two looks.
    if paths.shards.exists() and any(paths.shards.iterdir()) and not paths.run.exists():
        raise InputError(f"output.dir={folder} has files in shards/ but no run.json: choose another folder.")
    return paths


def earlier_run(paths: RunPaths, fingerprint: Fingerprint) -> RunDir | None:
    """The run that the folder holds, if any, which must be of the same fingerprint.

    Raises:
        InputError: it is a run of another fingerprint, or cannot be read.
    """
    if not paths.run.exists():
        return None
    run = read_run(paths)
    if differences(run.fingerprint, fingerprint):
        raise InputError(
            f"output.dir={paths.root} holds a run with another fingerprint ({describe(run.fingerprint, fingerprint)}): "
            "choose another folder, or the earlier values."
        )
    return run


def read_run(paths: RunPaths) -> RunDir:
    """The run that a folder holds.

    Raises:
        InputError: it holds none, or ``run.json`` cannot be read.
    """
    stored = read_description(paths)
    try:
        return RunDir(
            paths=paths,
            fingerprint=Fingerprint(stored["fingerprint"]),
            rows=stored["rows"],
            samples=stored["samples"],
            rows_per_shard=stored["rows_per_shard"],
            format=stored["output_format"],
            dtype=stored["dtype"],
            attempt=len(stored["attempts"]) - 1,
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{paths.run} is no description of a run: {error!r} is wrong in it.") from error


def read_row_ids(paths: RunPaths) -> pa.ChunkedArray:
    """The ids of all rows, in order.

    Raises:
        InputError: they cannot be read.
    """
    try:
        return pq.read_table(paths.rows).column("row_id")
    except (OSError, KeyError, pa.ArrowException) as error:
        raise InputError(f"{paths.rows}, the ids of the rows, cannot be read: {error}.") from error


def open_run(
    paths: RunPaths,
    config: Config,
    fingerprint: Fingerprint,
    row_ids: Sequence[str],
    dtype: str,
    attention: str,
    workers: int,
) -> RunDir:
    """Start a run in the folder, or go on with the one that is there, and count this attempt.

    The partition into shards is decided here once, and kept by later attempts whatever their number of workers.

    Raises:
        InputError: the folder holds a run of another fingerprint or dtype.
    """
    with locked(paths.run_lock):
        if earlier_run(paths, fingerprint) is None:
            paths.shards.mkdir(exist_ok=True)
            table = pa.table({"row_id": pa.array(row_ids, pa.string())})
            # Before run.json, which says that all that a run needs is there.
            write_whole(paths.rows, paths.temporary(paths.rows), lambda temporary: pq.write_table(table, temporary))
            stored = _describe(config, fingerprint, row_ids, dtype, workers)
        else:
            stored = read_description(paths)
        if stored["dtype"] != dtype:
            raise InputError(
                f"model.dtype={config.model.dtype} is {dtype} here, but the run in {paths.root} has {stored['dtype']}: "
                f"set model.dtype={stored['dtype']}."
            )
        stored["attempts"].append(_attempt(config, attention, workers))
        content = json.dumps(stored, indent=2) + "\n"
        write_whole(paths.run, paths.temporary(paths.run), lambda temporary: _write_text(temporary, content))
    return read_run(paths)


def read_description(paths: RunPaths) -> dict[str, Any]:
    """All that ``run.json`` says.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        stored = json.loads(paths.run.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{paths.root} holds no run: there is no run.json in it.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{paths.run} cannot be read: {error}.") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise InputError(f"{paths.run} is not of format {FORMAT}, the one that this version reads.")
    return stored


def _describe(
    config: Config, fingerprint: Fingerprint, row_ids: Sequence[str], dtype: str, workers: int
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "fingerprint": fingerprint.values,
        "digest": fingerprint.digest,
        "rows": len(row_ids),
        "samples": config.sampling.n,
        "rows_per_shard": rows_per_shard(len(row_ids), config.output.rows_per_shard, workers),
        "output_format": config.output.format,
        "dtype": dtype,
        "config": asdict(config),
        "packages": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "attempts": [],
    }


def rows_per_shard(rows: int, wanted: int, workers: int) -> int:
    """Rows of a shard: what the configuration says, or fewer, so that several workers can share the rows evenly."""
    return wanted if workers == 1 else min(wanted, math.ceil(rows / (SHARDS_PER_WORKER * workers)))


def _attempt(config: Config, attention: str, workers: int) -> dict[str, Any]:
    """What may differ between the attempts of a run."""
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


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _write_text(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
