"""Time reading a large dataset: seconds until its rows can be asked for, milliseconds of a shard, and peak memory.

    python -m jobs.bench.reading --rows 1000000 --folder /tmp/reading

Each format is read in processes of its own, so that one's memory is not another's.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from rollout.config.compose import load_config
from rollout.data.prompts import read_prompts

FORMATS = ("jsonl", "csv", "parquet")
_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "wizards", "mix", "jade", "potions")
_ROWS_PER_GROUP = 50_000


def write_files(folder: Path, rows: int) -> None:
    """Write the same rows in each format: an id, a prompt of some 500 characters, and two more columns."""
    rng = random.Random(0)
    schema = pa.schema([("id", pa.string()), ("prompt", pa.string()), ("score", pa.float64()), ("source", pa.string())])
    with (
        open(folder / "rows.jsonl", "w", encoding="utf-8") as lines,
        open(folder / "rows.csv", "w", encoding="utf-8", newline="") as table,
        pq.ParquetWriter(folder / "rows.parquet", schema) as parquet,
    ):
        writer = csv.writer(table)
        writer.writerow(schema.names)
        for start in range(0, rows, _ROWS_PER_GROUP):
            group = []
            for index in range(start, min(start + _ROWS_PER_GROUP, rows)):
                prompt = " ".join(rng.choices(_WORDS, k=100))
                group.append({"id": f"{index:09d}", "prompt": prompt, "score": rng.random(), "source": "bench"})
            lines.writelines(json.dumps(row) + "\n" for row in group)
            writer.writerows(row.values() for row in group)
            parquet.write_table(pa.Table.from_pylist(group, schema))


def read(path: str, overrides: list[str]) -> None:
    """Read a file as a job does, and print seconds, rows and peak megabytes as JSON."""
    config = load_config(["output.dir=unused", f"data.path='{path}'", "data.id_column=id", *overrides]).data
    before, start, cpu_start = _peak_mb(), time.perf_counter(), time.process_time()
    prompts = read_prompts(config)
    prompts.kept.digest()
    read_seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    start = time.perf_counter()
    middle = len(prompts) // 2
    shard = list(prompts.rows(middle, middle + 1024))
    print(
        json.dumps(
            {
                "rows": len(prompts),
                "seconds": round(read_seconds, 2),
                "cpu_seconds": round(cpu_seconds, 2),
                "shard_ms": round(1000 * (time.perf_counter() - start) * 1024 / len(shard), 1),
                "start_mb": round(before),
                "own_mb": round(_own_mb()),
                "peak_mb": round(_peak_mb()),
            }
        )
    )


def _own_mb() -> float:
    """Return the resident memory that is no mapped file: the system takes back what is mapped when it needs to."""
    process = psutil.Process().memory_info()
    return float(process.rss - process.shared) / 2**20


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Write the files where they are missing, and time each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument(
        "--folder", type=Path, help="where the files are written and kept; a temporary folder if left out"
    )
    parser.add_argument("--read", help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.read:
        read(arguments.read, overrides)
        return
    with tempfile.TemporaryDirectory(prefix="reading-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "rows.parquet").exists():
            write_files(folder, arguments.rows)
        for kind in FORMATS:
            file = folder / f"rows.{kind}"
            for title, cache, further in (
                ("first start", temporary, []),
                ("second start", temporary, []),
                ("data.limit=1000", f"{temporary}/limit", ["data.limit=1000"]),
            ):
                command = [sys.executable, "-m", "jobs.bench.reading", "--read", str(file), *further, *overrides]
                done = subprocess.run(command, env=_environment(cache), capture_output=True, text=True, check=True)
                print(f"{kind:8} {file.stat().st_size >> 20:5} MB  {title:16}", done.stdout.strip(), flush=True)


def _environment(cache: str) -> dict[str, str]:
    return {**os.environ, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    main()
