"""Measure whether memory grows in a long run.

    python -m jobs.bench.soak random:tiny --rows 50000 --calls 200
    python -m jobs.bench.soak random:tiny --rows 5000 --calls 0 --trace

First ``--rows`` rows go through one call of `Engine.stream`, and no record is kept. Then one engine is called
``--calls`` times. Memory is read at 10 %, 50 % and 100 % of each. The report gives the growth from the first to the
last reading: bytes of the process and objects by type; with ``--trace`` also the lines that allocated the most, which
makes a run several times slower.
"""

from __future__ import annotations

import gc
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from jobs.bench.lib import cli, tables
from rollout import Engine, SamplingParams

MARKS = (0.1, 0.5, 1.0)
"""Shares of the work after which memory is read."""
PROMPT_TOKENS, NEW_TOKENS = (4, 12), (1, 6)
"""Least and most of a row."""
ROWS_OF_A_CALL = 16
TOP = 10
"""Types and lines that are named."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Memory after some rows or calls."""

    done: int
    rss_bytes: int
    objects: Counter[str]
    """Number of objects per type that the garbage collector tracks."""
    traced: tracemalloc.Snapshot | None


def read(done: int) -> Reading:
    """Read the memory of this process."""
    gc.collect()
    objects: Counter[str] = Counter()
    for kind, count in Counter(map(type, gc.get_objects())).items():
        objects[f"{kind.__module__}.{kind.__qualname__}"] += count
    traced = tracemalloc.take_snapshot() if tracemalloc.is_tracing() else None
    return Reading(done, psutil.Process().memory_info().rss, objects, traced)


def prompts(count: int, vocabulary: int, seed: int) -> Iterator[list[int]]:
    """Yield short random prompts."""
    rng = random.Random(seed)
    for _ in range(count):
        yield [rng.randrange(vocabulary) for _ in range(rng.randint(*PROMPT_TOKENS))]


def params(count: int, seed: int) -> list[SamplingParams]:
    """Few distinct objects, so that they do not count as growth."""
    rng = random.Random(seed)
    kinds = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in range(NEW_TOKENS[0], NEW_TOKENS[1] + 1)]
    return rng.choices(kinds, k=count)


def marks(count: int) -> list[int]:
    """Return the counts after which memory is read."""
    return [max(1, round(share * count)) for share in MARKS]


def one_call(engine: Engine, rows: int, vocabulary: int) -> list[Reading]:
    """Return readings while ``rows`` rows go through one call."""
    readings, wanted = [], marks(rows)
    for done, _ in enumerate(engine.stream(prompts(rows, vocabulary, 0), params(rows, 0)), 1):
        if done in wanted:
            readings.append(read(done))
    return readings


def many_calls(engine: Engine, calls: int, vocabulary: int) -> list[Reading]:
    """Return readings between ``calls`` calls."""
    readings, wanted = [], marks(calls)
    for done in range(1, calls + 1):
        engine.generate(list(prompts(ROWS_OF_A_CALL, vocabulary, done)), params(ROWS_OF_A_CALL, done), seed=done)
        if done in wanted:
            readings.append(read(done))
    return readings


HEADER = ("what", *(f"RSS at {share:.0%}" for share in MARKS), "growth for 1,000 more")


def line(name: str, readings: list[Reading]) -> tuple[str, ...]:
    """Return a row under `HEADER`."""
    first, last = readings[0], readings[-1]
    growth = 1000 * (last.rss_bytes - first.rss_bytes) / max(1, last.done - first.done)
    sizes = (f"{reading.rss_bytes / 2**20:.1f} MiB" for reading in readings)
    return (name, *sizes, f"{growth / 2**10:.1f} KiB")


def grown(readings: list[Reading]) -> list[str]:
    """Return a line per type that grew, the most first, and per allocating line of code."""
    first, last = readings[0], readings[-1]
    more = last.objects - first.objects
    lines = [f"  {count:+} {name}" for name, count in more.most_common(TOP)]
    if first.traced and last.traced:
        found = last.traced.compare_to(first.traced, "lineno")
        lines += [f"  {place}" for place in sorted(found, key=lambda place: -place.size_diff)[:TOP]]
    return lines


def main() -> int:
    """Print a table, and what grew."""
    parser = cli.options("Shows whether memory grows while the engine runs for long.", device="cpu")
    parser.add_argument("--rows", type=int, default=50_000, help="of the one call")
    parser.add_argument("--calls", type=int, default=200, help="of the one engine")
    parser.add_argument("--max-rows", type=int, default=256, help="that live together")
    parser.add_argument("--trace", action="store_true", help="name the lines that allocated what grew")
    given = parser.parse_args()
    model: Any = cli.model(cli.folder(parser, given), given)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if given.trace:
        tracemalloc.start()
    lines = [HEADER]
    for name, run, count in (("rows", one_call, given.rows), ("calls", many_calls, given.calls)):
        if not count:
            continue
        readings = run(Engine(model, None, max_rows=given.max_rows), count, vocabulary)
        lines.append(line(f"{count} {name}", readings))
        print(f"{name}: objects and lines that grew from {readings[0].done} to {readings[-1].done}", flush=True)
        print("\n".join(grown(readings)), flush=True)
    tracemalloc.stop()
    print(tables.render(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
