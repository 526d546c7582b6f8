"""Time what grows with a run's rows: its start, its resume, and its verification, in seconds and peak megabytes.

    python -m jobs.bench.large_runs --rows 1000000 --rows-per-shard 1000 --folder /tmp/large

No model is loaded: shards with made-up records are written in the form that commits give them. Each figure is of a
process of its own. A run that stands in the folder already is measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from rollout.config.compose import load_config
from rollout.config.schema import Config
from rollout.data.prompts import read_prompts
from rollout.records import Record
from rollout.run_dir.fingerprint import Fingerprint
from rollout.run_dir.hashed_file import file_sha256
from rollout.run_dir.record_table import table_of
from rollout.run_dir.run import RunDir, existing_run, open_run, prepare_folder
from rollout.run_dir.sealed_json import seal
from rollout.run_dir.shards import Manifest, count_table
from rollout.verify import verify

_TOKENS = 16
"""Of each completion; no figure but that of reading the files depends on it."""


def write_rows(path: Path, rows: int) -> None:
    """Write a dataset of short prompts."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for index in range(rows):
            file.write(
                json.dumps({"prompt": f"{index}: what is {rng.randrange(10**6)} + {rng.randrange(10**6)}?"}) + "\n"
            )


def config_of(folder: Path, rows_per_shard: int, samples: int) -> Config:
    """Return the configuration of the run in a folder."""
    return load_config(
        [
            f"data.path={folder / 'rows.jsonl'}",
            f"output.dir={folder / 'out'}",
            f"output.rows_per_shard={rows_per_shard}",
            f"sampling.n={samples}",
            "data.keep_columns=[]",
        ]
    )


def start(config: Config) -> RunDir:
    """Read the prompts and begin or resume the run, as a job does before it loads the model."""
    prompts = read_prompts(config.data)
    fingerprint = Fingerprint({"content": prompts.content, "kept": prompts.kept.digest()})
    paths = prepare_folder(config.output.dir)
    existing_run(paths, fingerprint)
    return open_run(
        paths,
        config,
        fingerprint,
        prompts.row_ids,
        dtype="float32",
        attention="none",
        workers=1,
        template_dates={},
        token=f"bench-{os.getpid()}",
    )


def write_shards(config: Config) -> None:
    """Write all shards of the run that are not there yet, in the form that commits give them."""
    run = start(config)
    ids = read_prompts(config.data).row_ids
    committed = run.committed()
    largest = run.samples * len(run.shard_rows(0))
    made_up = table_of([_record(sample % run.samples) for sample in range(largest)])
    for shard in set(range(run.shards)) - committed:
        rows = run.shard_rows(shard)
        row_ids = np.repeat(np.array(ids[rows.start : rows.stop], object), run.samples)
        table = made_up.slice(0, len(row_ids)).set_column(0, "row_id", pa.array(row_ids, pa.string()))
        path, manifest = run.paths.shard(shard, "parquet"), run.paths.manifest(shard)
        pq.write_table(table, path, compression="zstd")
        described = Manifest(
            **asdict(count_table(table)),
            shard=shard,
            file=path.name,
            bytes=path.stat().st_size,
            sha256=file_sha256(path),
            fingerprint=run.fingerprint.digest,
        )
        manifest.write_bytes(seal(asdict(described)))


def _record(sample: int) -> Record:
    return Record(
        row_id="",
        sample=sample,
        prompt_ids=[1] * _TOKENS,
        completion_ids=[2] * _TOKENS,
        text="made up",
        logprobs=[-0.5] * _TOKENS,
        sampler_logprobs=[-0.5] * _TOKENS,
        finish_reason="length",
        reward=0.5,
    )


def measure(name: str, config: Config) -> None:
    """Do one thing and print its seconds, peak megabytes and, where it says something, what came of it."""

    def resume() -> str:
        run = start(config)
        return f"{len(run.committed())} of {run.shards} shards committed"

    def check() -> str:
        findings = verify(Path(config.output.dir))
        return f"{'complete' if findings.complete else 'INCOMPLETE'}, {findings.found} samples"

    actions: dict[str, Callable[[], str]] = {"start": resume, "verify": check}
    before, own = _peak_mb(), _own_mb()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    said = actions[name]()
    seconds = time.perf_counter() - begin
    cpu = time.process_time() - cpu_begin
    print(
        f"{seconds:7.2f} s ({cpu:.2f} s of CPU), {_peak_mb() - before:6.0f} MB more at the peak, of which "
        f"{_own_mb() - own:5.0f} MB remain that are no mapped file ({said})"
    )


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _own_mb() -> float:
    process = psutil.Process().memory_info()
    return float(process.rss - process.shared) / 2**20


def main() -> None:
    """Write the dataset and the run where they are missing, and measure each action in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-per-shard", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="kept with the run; a temporary folder if left out")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="large-runs-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        config = config_of(folder, arguments.rows_per_shard, arguments.samples)
        if arguments.measure == "write":
            write_shards(config)
        elif arguments.measure:
            measure(arguments.measure, config)
        else:
            if not (folder / "rows.jsonl").exists():
                write_rows(folder / "rows.jsonl", arguments.rows)
            for title, action, cache in (
                ("first start", "start", f"{temporary}/cache"),
                ("later start", "start", f"{temporary}/cache"),
                ("", "write", f"{temporary}/cache"),
                ("resume", "start", f"{temporary}/cache"),
                ("verify", "verify", f"{temporary}/cache"),
            ):
                sizes = ["--rows-per-shard", str(arguments.rows_per_shard), "--samples", str(arguments.samples)]
                command = [sys.executable, "-m", "jobs.bench.large_runs"]
                command += ["--folder", str(folder), "--measure", action]
                environment = {**os.environ, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
                done = subprocess.run(
                    [*command, *sizes], env=environment, stdout=subprocess.PIPE, text=True, check=True
                )
                if title:
                    print(f"{title:12} {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
