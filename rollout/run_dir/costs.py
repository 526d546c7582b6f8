"""What a run has cost: device time and tokens, of attempts that were killed too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from rollout.run_dir.attempts import read_attempts
from rollout.run_dir.file_system import contents, put
from rollout.run_dir.run import RunDir, read_run_json
from rollout.run_dir.sealed_json import seal
from rollout.run_dir.shards import RecordCounts


@dataclass(frozen=True, slots=True)
class Cost:
    """What all attempts of a run have cost, up to the moment when it was written."""

    attempts: int
    interrupted: int
    """Attempts of which no worker said how they ended: killed ones, and one that is not at its end."""
    wall_seconds: float
    """From the begin of the first attempt to the last sign of any, pauses between them included."""
    device_seconds: dict[str, float]
    """By kind: the devices of each launch's processes times the seconds from its start to its end or last sign."""
    loading_seconds: float
    """Of processes, before the first request, with reading the data and loading the model."""
    generating_seconds: float
    """Of workers, in steps of the engine."""
    waiting_seconds: float
    """Of workers, with nothing to claim, while others finish; of the first worker of launches that ended."""
    committing_seconds: float
    """Beside the generation, in a thread, so no part of the others; of the same workers."""
    slowest_shard: dict[str, float] | None
    """The shard that took these workers longest from its opening to its commit, and the seconds."""
    generated_tokens: int
    """Drawn by all attempts. Of a killed one, those of its last second are not known."""
    useful_tokens: int
    """Completion tokens of the records."""
    lost_tokens: int
    """Drawn, but in no record: lost to kills, done twice, or dropped at a commit."""
    prefilled_tokens: int
    """Went through prefill, in all attempts."""
    prefilled_again_tokens: int
    """Of these, more than the prompts have: of samples that went on after a stop or preemption, or were done twice."""


def cost_of(run: RunDir, totals: RecordCounts, metrics: Iterable[Mapping[str, Any]]) -> Cost | None:
    """Add up what all attempts of a run have cost; None if none has begun.

    Args:
        totals: counts of all records.
        metrics: the lines of all workers (`rollout.run_dir.metrics.read_metrics`).
    """
    lines: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for line in metrics:
        lines[line["attempt"]].append(line)
    attempts = list(read_attempts(run.files, run.paths))
    if not attempts:
        return None
    devices: dict[str, float] = defaultdict(float)
    begun: list[float] = []
    ended: list[float] = []
    loading = waiting = committing = 0.0
    slowest: list[dict[str, float]] = []
    for attempt in attempts:
        own = lines[attempt["attempt"]]
        processes = attempt.get("processes", 1)
        measured = attempt.get("cost", {})
        started = datetime.fromisoformat(attempt["started"]).timestamp()
        end = attempt.get("ended") or max((line["time"] for line in own), default=started)
        load = attempt.get("loading_seconds", 0.0)
        begun.append(started - load)
        ended.append(max(end, started))
        kind, count = _devices(own)
        devices[kind] += processes * count * (ended[-1] - begun[-1])
        loading += processes * load
        waiting += measured.get("waiting_seconds", 0.0)
        committing += measured.get("committing_seconds", 0.0)
        slowest += [measured["slowest_shard"]] if measured.get("slowest_shard") else []
    everything = [line for own in lines.values() for line in own]
    tokens = _tokens(everything)
    prompts = totals.prompt_tokens // run.samples
    return Cost(
        attempts=len(attempts),
        interrupted=sum("ended" not in attempt for attempt in attempts),
        wall_seconds=round(max(ended) - min(begun), 3),
        device_seconds={kind: round(seconds, 3) for kind, seconds in sorted(devices.items())},
        loading_seconds=round(loading, 3),
        generating_seconds=round(sum(line["steps"] * line["step_ms"] for line in everything) / 1e3, 3),
        waiting_seconds=round(waiting, 3),
        committing_seconds=round(committing, 3),
        slowest_shard=max(slowest, key=lambda shard: shard["seconds"], default=None),
        generated_tokens=tokens["generated_tokens"],
        useful_tokens=totals.completion_tokens,
        lost_tokens=max(0, tokens["generated_tokens"] - totals.completion_tokens),
        prefilled_tokens=tokens["prefilled_tokens"],
        prefilled_again_tokens=max(0, tokens["prefilled_tokens"] - prompts),
    )


def _devices(lines: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """Return the kind of device that metrics are of, and how many a process has."""
    if not lines:
        return "unknown", 1
    # GPUs stand there by their UUIDs, a host with the cgroup that limits it.
    names = lines[0]["device"].split()
    gpus = sum(name.startswith("GPU-") for name in names)
    return ("gpu", gpus) if gpus else (names[0] if names else "unknown", 1)


def _tokens(lines: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    generated = prefilled = 0
    for line in lines:
        generated += line["new_tokens"]
        prefilled += line["prefill_tokens"]
    return {"generated_tokens": generated, "prefilled_tokens": prefilled}


def write_cost(run: RunDir, cost: Cost, writer: str) -> None:
    """Add a complete run's cost to ``run.json``; a retry that completes the run again replaces it."""
    stored = read_run_json(run.paths, run.files)
    path = run.paths.run
    # Not in work/, which other workers of a complete run are removing.
    temporary = path.with_name(f".{writer}-{path.name}")
    put(run.files, path, temporary, contents(seal({**stored, "cost": asdict(cost)})))


def cost_lines(cost: Cost) -> dict[str, str]:
    """Return lines for the terminal, by name."""
    devices = ", ".join(f"{_hours(seconds)} on {kind}" for kind, seconds in cost.device_seconds.items())
    parts = [
        f"{_hours(cost.loading_seconds)} loading",
        f"{_hours(cost.generating_seconds)} in steps",
        *([f"{_hours(cost.waiting_seconds)} waiting"] if cost.waiting_seconds >= 1 else []),
    ]
    without = f", {cost.interrupted} killed or still running" if cost.interrupted else ""
    attempts = f"{cost.attempts} attempts{without}; " if cost.attempts > 1 else ""
    lost = f"{cost.lost_tokens:,} of {cost.generated_tokens:,} tokens in no record"
    again = f"{cost.prefilled_again_tokens:,} of {cost.prefilled_tokens:,} prefilled again"
    return {
        "cost": f"{devices} ({', '.join(parts)}), {_hours(cost.wall_seconds)} in all",
        "lost": f"{attempts}{lost}, {again}",
    }


def _hours(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
