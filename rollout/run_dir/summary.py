"""The summary of a run, read from its directory."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.compute as pc

from rollout.errors import shorten
from rollout.run_dir.costs import Cost, cost_lines, cost_of
from rollout.run_dir.metrics import read_metrics
from rollout.run_dir.part_file import ShardKey, finished_records
from rollout.run_dir.run import RunDir
from rollout.run_dir.shard_batches import read_batches
from rollout.run_dir.shards import CountedRecords, Manifest, RecordCounts, read_manifest

_FIRST_ERRORS = 3


@dataclass(frozen=True, slots=True)
class Totals(RecordCounts):
    """Counts over all finished samples of a run."""

    shards: int
    """Committed shards."""

    @property
    def mean_reward(self) -> float | None:
        return self.reward_sum / self.rewards if self.rewards else None


class Speed(NamedTuple):
    """Speed of a run's last attempt that generated anything."""

    tokens_per_s: float | None
    """Over all workers; None if the attempt took no measurable time."""
    live_samples_min: int
    """Fewest live samples of one worker while others were waiting."""
    live_samples_max: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Totals and speed of a run."""

    run: RunDir
    totals: Totals
    speed: Speed | None
    """None without metrics."""
    first_errors: tuple[str, ...] = ()
    """Some input rows with an error, and what it is."""
    cost: Cost | None = None

    def lines(self) -> list[str]:
        """Format the summary for the terminal."""
        run, totals, speed = self.run, self.totals, self.speed
        tokens = f"{totals.prompt_tokens} in prompts, {totals.completion_tokens} generated"
        if speed is not None and speed.tokens_per_s is not None:
            tokens += f", {speed.tokens_per_s:.1f} tokens/s"
        table = {
            "prompts": f"{run.rows}, {totals.samples} samples ({run.samples} each)",
            "tokens": tokens,
            "live batch": "" if speed is None else f"{speed.live_samples_min} to {speed.live_samples_max} samples",
            "finished": format_counts(totals.finish_reasons),
            "errors": f"{totals.error_rows} prompts ({format_counts(totals.errors)})" if totals.errors else "none",
            "error rows": "; ".join(self.first_errors),
            "mean reward": "" if totals.mean_reward is None else f"{totals.mean_reward:.4f}",
            **({} if self.cost is None else cost_lines(self.cost)),
            "files": f"{run.paths.shards}/*.{run.format}",
            "verify": f"python -m rollout.verify {shlex.quote(str(run.paths.root))}",
        }
        return [f"{name + ':':<13}{value}" for name, value in table.items() if value]


def summarise(run: RunDir) -> Summary:
    """Summarise a complete run."""
    totals = read_totals(run)
    metrics = list(read_metrics(run.paths))
    return Summary(
        run=run,
        totals=totals,
        speed=_speed(metrics),
        first_errors=_first_errors(run) if totals.errors else (),
        cost=cost_of(run, totals, metrics),
    )


def _first_errors(run: RunDir) -> tuple[str, ...]:
    """Describe the first input rows with an error, reading only the shards that have some."""
    described: dict[str, str] = {}
    for shard in sorted(run.committed()):
        if not read_manifest(run.paths.manifest(shard), run.files).errors:
            continue
        for row in _failed(run, shard):
            text = f"{row['row_id']} ({row['error_class']}: {shorten(' '.join(row['error'].split()), longest=80)})"
            described.setdefault(row["row_id"], text)
            if len(described) == _FIRST_ERRORS:
                return tuple(described.values())
    return tuple(described.values())


def _failed(run: RunDir, shard: int) -> Iterator[dict[str, str]]:
    """Yield the records of a shard that have an error."""
    for table in read_batches(run.paths.shard(shard, run.format), ["row_id", "error_class", "error"], run.files):
        yield from table.filter(pc.not_equal(table["error_class"], "")).to_pylist()


def read_totals(run: RunDir) -> Totals:
    """Count all finished samples of a run, in committed shards and in part files.

    Raises:
        InputError: a manifest cannot be read.
    """
    found = [_shard_counts(run, shard) for shard in range(run.shards)]
    counts = [shard for shard in found if shard is not None]
    return Totals(
        rows=sum(shard.rows for shard in counts),
        samples=sum(shard.samples for shard in counts),
        error_rows=sum(shard.error_rows for shard in counts),
        errors=_sum_counts(shard.errors for shard in counts),
        finish_reasons=_sum_counts(shard.finish_reasons for shard in counts),
        prompt_tokens=sum(shard.prompt_tokens for shard in counts),
        completion_tokens=sum(shard.completion_tokens for shard in counts),
        rewards=sum(shard.rewards for shard in counts),
        reward_sum=sum(shard.reward_sum for shard in counts),
        shards=sum(isinstance(shard, Manifest) for shard in counts),
    )


def _shard_counts(run: RunDir, shard: int) -> RecordCounts | None:
    """Return the counts of a committed or begun shard; None for a shard that no worker has begun."""
    manifest = run.paths.manifest(shard)
    if not run.files.exists(manifest):
        counted = CountedRecords()
        try:
            counted.add(finished_records(run.files, run.paths, ShardKey(run.fingerprint.digest, shard)))
        except FileNotFoundError:
            # Committed meanwhile.
            return read_manifest(manifest, run.files) if run.files.exists(manifest) else None
        counts = counted.counts()
        return counts if counts.samples else None
    return read_manifest(manifest, run.files)


def _speed(metrics: Sequence[Mapping[str, Any]]) -> Speed | None:
    """Return the speed of the last attempt by the metrics of all; None if there are none."""
    if not metrics:
        return None
    attempt = max(line["attempt"] for line in metrics)
    lines = [line for line in metrics if line["attempt"] == attempt]
    start = min(line["time"] - line["seconds"] for line in lines)
    seconds = max(line["time"] for line in lines) - start
    most = max(line["live_rows_max"] for line in lines)
    under_load = [line["live_rows_min"] for line in lines if line["live_rows_min"] is not None]
    tokens = sum(line["new_tokens"] for line in lines)
    return Speed(
        tokens_per_s=tokens / seconds if seconds else None,
        live_samples_min=min(under_load, default=most),
        live_samples_max=most,
    )


def _sum_counts(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Sum counts by name, the largest first."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total.most_common())


def format_counts(counts: dict[str, int]) -> str:
    """Format counts by name, e.g. ``length 155, stop 101``."""
    return ", ".join(f"{name} {count}" for name, count in counts.items())
