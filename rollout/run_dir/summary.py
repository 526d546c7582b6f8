"""What a finished run holds, in a few lines; all of it read from its folder."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rollout.run_dir.metrics import read_metrics
from rollout.run_dir.part_file import whole_records
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import RunDir
from rollout.run_dir.shards import Contents, Manifest, contents_of, read_manifest


@dataclass(frozen=True, slots=True)
class Totals:
    """Of what a run has finished."""

    shards: int
    """Committed ones."""
    samples: int
    error_rows: int
    errors: dict[str, int]
    finish_reasons: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    mean_reward: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """Totals of a run, and the speed of its last attempt that generated anything."""

    run: RunDir
    totals: Totals
    tokens_per_s: float | None
    live_rows: tuple[int, int] | None
    """Fewest live rows while others waited, and most."""

    def lines(self) -> list[str]:
        """For people."""
        run, totals = self.run, self.totals
        speed = "" if self.tokens_per_s is None else f", {self.tokens_per_s:.1f} tokens/s"
        table = {
            "rows": f"{run.rows} rows, {totals.samples} samples ({run.samples} a row)",
            "tokens": f"{totals.prompt_tokens} of prompts, {totals.completion_tokens} generated{speed}",
            "live batch": "" if self.live_rows is None else f"{self.live_rows[0]} to {self.live_rows[1]} rows",
            "finished": counts(totals.finish_reasons),
            "errors": f"{totals.error_rows} rows ({counts(totals.errors)})" if totals.errors else "none",
            "mean reward": "" if totals.mean_reward is None else f"{totals.mean_reward:.4f}",
            "files": f"{run.paths.shards}/*.{run.format}",
            "verify": f"python -m rollout.verify {shlex.quote(str(run.paths.root))}",
        }
        return [f"{name + ':':<13}{value}" for name, value in table.items() if value]


def summarise(run: RunDir) -> Summary:
    """The summary of a complete run."""
    return Summary(run, finished(run), *_speed(run))


def finished(run: RunDir) -> Totals:
    """The totals of all samples that no kill would lose, in committed shards or not.

    Raises:
        InputError: a manifest cannot be read.
    """
    shards = [_contents(run.paths, shard) for shard in range(run.shards)]
    contents = [shard for shard in shards if shard is not None]
    rewards = sum(shard.rewards for shard in contents)
    return Totals(
        shards=sum(isinstance(shard, Manifest) for shard in contents),
        samples=sum(shard.samples for shard in contents),
        error_rows=sum(shard.error_rows for shard in contents),
        errors=_total(shard.errors for shard in contents),
        finish_reasons=_total(shard.finish_reasons for shard in contents),
        prompt_tokens=sum(shard.prompt_tokens for shard in contents),
        completion_tokens=sum(shard.completion_tokens for shard in contents),
        mean_reward=sum(shard.reward_sum for shard in contents) / rewards if rewards else None,
    )


def _contents(paths: RunPaths, shard: int) -> Contents | None:
    """Of a shard that is committed, or that is worked on; None of one that nobody has begun."""
    manifest = paths.manifest(shard)
    if not manifest.exists():
        try:
            return contents_of(list(whole_records(paths.part(shard))))
        except FileNotFoundError:  # nobody has begun it, or it was committed a moment ago
            if not manifest.exists():
                return None
    return read_manifest(manifest)


def _speed(run: RunDir) -> tuple[float | None, tuple[int, int] | None]:
    """Tokens a second over all workers, and the range of live rows of one worker."""
    lines = list(read_metrics(run.paths))
    if not lines:
        return None, None
    attempt = max(line["attempt"] for line in lines)
    lines = [line for line in lines if line["attempt"] == attempt]
    began = min(line["time"] - line["seconds"] for line in lines)
    seconds = max(line["time"] for line in lines) - began
    most = max(line["live_rows_max"] for line in lines)
    under_load = [line["live_rows_min"] for line in lines if line["live_rows_min"] is not None]
    tokens = sum(line["new_tokens"] for line in lines)
    return tokens / seconds if seconds else None, (min(under_load, default=most), most)


def _total(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total.most_common())


def counts(values: dict[str, int]) -> str:
    """Numbers by name, for people."""
    return ", ".join(f"{name} {count}" for name, count in values.items())
