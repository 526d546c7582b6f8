"""What a finished run holds, in a few lines; all of it read from its folder."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rollout.metrics import read_metrics
from rollout.run import Run
from rollout.shards import read_manifest


@dataclass(frozen=True, slots=True)
class Summary:
    """Totals over the shards of a run, and the speed of its last attempt that generated anything."""

    run: Run
    samples: int
    error_rows: int
    errors: dict[str, int]
    finish_reasons: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    mean_reward: float | None
    tokens_per_s: float | None
    live_rows: tuple[int, int] | None
    """Fewest live rows while others waited, and most."""

    def lines(self) -> list[str]:
        """For people."""
        run = self.run
        speed = "" if self.tokens_per_s is None else f", {self.tokens_per_s:.1f} tokens/s"
        table = {
            "rows": f"{run.rows} rows, {self.samples} samples ({run.samples} a row)",
            "tokens": f"{self.prompt_tokens} of prompts, {self.completion_tokens} generated{speed}",
            "live batch": "" if self.live_rows is None else f"{self.live_rows[0]} to {self.live_rows[1]} rows",
            "finished": _counts(self.finish_reasons),
            "errors": f"{self.error_rows} rows ({_counts(self.errors)})" if self.errors else "none",
            "mean reward": "" if self.mean_reward is None else f"{self.mean_reward:.4f}",
            "files": f"{run.paths.shards}/*.{run.format}",
            "verify": f"python -m rollout.verify {shlex.quote(str(run.paths.root))}",
        }
        return [f"{name + ':':<13}{value}" for name, value in table.items() if value]


def summarise(run: Run) -> Summary:
    """The summary of a complete run."""
    manifests = [read_manifest(run.paths.manifest(shard)) for shard in range(run.shards)]
    rewards = sum(manifest.rewards for manifest in manifests)
    tokens_per_s, live_rows = _speed(run)
    return Summary(
        run=run,
        samples=sum(manifest.samples for manifest in manifests),
        error_rows=sum(manifest.error_rows for manifest in manifests),
        errors=_total(manifest.errors for manifest in manifests),
        finish_reasons=_total(manifest.finish_reasons for manifest in manifests),
        prompt_tokens=sum(manifest.prompt_tokens for manifest in manifests),
        completion_tokens=sum(manifest.completion_tokens for manifest in manifests),
        mean_reward=sum(manifest.reward_sum for manifest in manifests) / rewards if rewards else None,
        tokens_per_s=tokens_per_s,
        live_rows=live_rows,
    )


def _speed(run: Run) -> tuple[float | None, tuple[int, int] | None]:
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


def _total(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total.most_common())


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
