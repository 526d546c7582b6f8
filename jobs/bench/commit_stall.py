"""Measure how long a commit stops the generation beside it, and how much memory it takes.

    python -m jobs.bench.commit_stall --rows 8192 --tokens 1024

No model is loaded. A worker stores the records of one shard, whose commit begins then in its thread, as in a job; from
there on a toy engine steps every few milliseconds, of which it computes one in Python and waits for the rest, as a loop
does for its device. The longest pause between two steps is the stall; the same without a commit stands beside it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from rollout.config.compose import load_config
from rollout.data.prompts import read_prompts
from rollout.job.prompt_reader import EncodedRow
from rollout.job.shard_worker import ShardWorker
from rollout.records import Record
from rollout.requests import Request
from rollout.run_dir.claims import Place, ShardClaims
from rollout.run_dir.fingerprint import Fingerprint
from rollout.run_dir.record_table import shard_schema
from rollout.run_dir.run import open_run, prepare_folder
from rollout.run_dir.workers import Worker, Workers
from rollout.tokenization.prompt import EncodedPrompt

_PYTHON_SECONDS, _STEP_SECONDS = 0.001, 0.003
_QUIET_STEPS = 1000
_PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Stall:
    """What the loop saw while a shard was committed."""

    records: int
    file_mb: float
    commit_s: float
    steps: int
    longest_ms: float
    """Longest pause between two steps during the commit."""
    p99_ms: float
    quiet_longest_ms: float
    """The same without a commit: what the machine itself does to the loop."""
    quiet_p99_ms: float
    begin_ms: float
    """In the loop itself: storing the last record and beginning the commit."""
    settle_ms: float
    """In the loop itself: seeing that it is done, closing its part file and looking for another shard."""
    peak_mb: float
    """Memory beyond that before the commit."""


def measure(folder: Path, rows: int, tokens: int, form: str) -> Stall:
    """Commit one shard of so many rows beside a toy engine."""
    (folder / "rows.txt").write_text("".join(f"prompt {number}\n" for number in range(rows)))
    config = load_config(
        [
            f"data.path={folder / 'rows.txt'}",
            "data.prompt_column=text",
            f"output.dir={folder / 'out'}",
            f"output.rows_per_shard={rows}",
            f"output.format={form}",
            f"sampling.max_new_tokens={tokens}",
        ]
    )
    prompts = read_prompts(config.data)
    schema = shard_schema(prompts.kept.schema, form)
    run = open_run(
        prepare_folder(config.output.dir),
        config,
        Fingerprint({}),
        prompts.row_ids,
        schema=schema,
        dtype="float32",
        attention="none",
        workers=1,
        template_dates={},
        token="bench",
    )
    me = Worker.of_process(run.attempt, 0, {})
    claims = ShardClaims(run.files, run.paths, Workers(run.files, run.paths, me, 120), run.shards, Place())
    prompt = EncodedPrompt(list(range(_PROMPT_TOKENS)))
    with ThreadPoolExecutor(1) as executor:
        worker = ShardWorker(
            run=run,
            claims=claims,
            writer=me.writer,
            prompts=prompts,
            schema=schema,
            encode=lambda rows: (EncodedRow(row, prompt) for row in rows),
            params=config.sampling.params(),
            executor=executor,
            seed=0,
        )
        process = psutil.Process()
        records = _records(worker.requests(), tokens)
        first = next(records)
        for record in records:
            worker.accept(record)
        quiet = _pauses(_QUIET_STEPS)
        before = process.memory_info().rss
        # The last record of the shard begins its commit.
        begun = time.perf_counter()
        worker.accept(first)
        accepted = time.perf_counter()
        pauses: list[float] = []
        peak = before
        while not run.complete():
            pauses += _pauses(10)
            peak = max(peak, process.memory_info().rss)
        seconds = time.perf_counter() - begun
        settling = time.perf_counter()
        worker.claim()
        settled = time.perf_counter() - settling
        worker.close()
    return Stall(
        records=rows,
        file_mb=round(run.paths.shard(0, form).stat().st_size / 1e6, 1),
        commit_s=round(seconds, 2),
        steps=len(pauses),
        longest_ms=round(1e3 * max(pauses), 1),
        p99_ms=round(1e3 * float(np.quantile(pauses, 0.99)), 1),
        quiet_longest_ms=round(1e3 * max(quiet), 1),
        quiet_p99_ms=round(1e3 * float(np.quantile(quiet, 0.99)), 1),
        begin_ms=round(1e3 * (accepted - begun), 1),
        settle_ms=round(1e3 * settled, 1),
        peak_mb=round((peak - before) / 1e6, 1),
    )


def _records(requests: Iterator[Request | None], tokens: int) -> Iterator[Record]:
    rng = np.random.default_rng(0)
    for request in requests:
        if request is None:
            # Nothing is left to claim.
            return
        logprobs = -rng.exponential(size=tokens).astype(np.float32)
        yield Record(
            row_id=request.row_id,
            sample=0,
            prompt_ids=list(request.prompt_ids),
            completion_ids=rng.integers(0, 128_000, tokens).tolist(),
            text="an answer of some words " * (tokens // 5),
            logprobs=logprobs.tolist(),
            sampler_logprobs=logprobs.tolist(),
            finish_reason="length",
        )


def _pauses(steps: int) -> list[float]:
    """Make some steps, and return the seconds from each to the next."""
    pauses = []
    last = time.perf_counter()
    for _ in range(steps):
        until = last + _PYTHON_SECONDS
        while time.perf_counter() < until:
            sum(range(100))
        time.sleep(_STEP_SECONDS - _PYTHON_SECONDS)
        now = time.perf_counter()
        pauses.append(now - last)
        last = now
    return pauses


def main() -> None:
    """Print the figures of one commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(measure(Path(folder), arguments.rows, arguments.tokens, arguments.format))


if __name__ == "__main__":
    main()
