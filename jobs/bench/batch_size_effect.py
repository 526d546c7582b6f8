"""Count the samples that depend on batch composition: this engine, and transformers' ``generate_batch``.

    python -m jobs.bench.batch_size_effect random:qwen2.5-1.5b --caps 8,64,256 --requests 256 --tokens 128

Every engine generates the same requests once per row cap, and each further cap is compared with the first, sample by
sample. Both run greedily, since ``generate_batch`` draws all rows from one stream of random numbers; this engine also
runs at temperature 1, where its noise is keyed by row. Two completions that have diverged stay different, so the share
grows with their length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import chain
from statistics import median
from typing import Any

from jobs.bench.engines.transformers_continuous import PAGE_TOKENS, Continuous
from jobs.bench.lib import cli, tables, workload
from jobs.bench.lib.workload import Request
from rollout import Engine, SamplingParams
from rollout.models.arrays import ceil_div

HEADER = ("engine", "draws", "rows at most", "against", "samples", "differ", "tokens before they part, median")
Completions = list[list[int]]


def ours(model: Any, requests: Sequence[Request], caps: Sequence[int]) -> tables.Lines:
    """Return rows under `HEADER`; as many rows are live as the cap allows, if memory suffices."""
    prompts = [list(request.ids) for request in requests]

    def run(rows: int, temperature: float) -> Completions:
        engine = Engine(model, None, policy="static", max_rows=rows)
        params = [SamplingParams(temperature=temperature, max_new_tokens=r.n, ignore_eos=True) for r in requests]
        return [list(record.completion_ids) for record in engine.generate(prompts, params, seed=0)]

    return [
        *lines("ours", "greedy", caps, lambda rows: run(rows, 0.0)),
        *lines("ours", "temperature 1", caps, lambda rows: run(rows, 1.0)),
    ]


def continuous(model: Any, requests: Sequence[Request], caps: Sequence[int]) -> tables.Lines:
    """Return rows under `HEADER`; memory suffices for as many rows as the cap allows."""
    blocks = max(ceil_div(len(request.ids) + request.n, PAGE_TOKENS) for request in requests)

    def run(rows: int) -> Completions:
        return Continuous(model, model.device, rows, (rows + 1) * blocks, do_sample=False)(requests)

    return lines("generate_batch", "greedy", caps, run)


def parted(first: Completions, other: Completions) -> list[int]:
    """Return the length of the common beginning of each sample that differs."""
    return [
        next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        for one, two in zip(first, other, strict=True)
        if one != two
    ]


def lines(name: str, draws: str, caps: Sequence[int], run: Callable[[int], Completions]) -> tables.Lines:
    """Return rows under `HEADER` for each cap but the first."""
    first, rows = run(caps[0]), list[tuple[str, ...]]()
    for cap in caps[1:]:
        places = parted(first, run(cap))
        share = f"{100 * len(places) / len(first):.2f} %"
        middle = f"{median(places):.0f}" if places else "-"
        rows.append((name, draws, str(cap), str(caps[0]), str(len(first)), share, middle))
    return rows


def main() -> int:
    """Print a line per engine and cap."""
    parser = cli.options("Compares what engines generate in batches of different sizes.")
    parser.add_argument("--caps", default="8,64,256", help="most rows that live, with commas between")
    parser.add_argument("--requests", type=int, default=256, help="of generated prompts, all different")
    parser.add_argument("--tokens", type=int, default=128, help="of a sample")
    given = parser.parse_args()
    caps = [int(text) for text in given.caps.split(",")]
    folder = cli.folder(parser, given)
    prompts = workload.prompts_for(folder, workload.Shape(requests=given.requests))
    requests = [Request(tuple(ids), given.tokens, group) for group, ids in enumerate(prompts)]
    # A model for each: `generate_batch` leaves another attention implementation behind.
    found = [ours(cli.model(folder, given), requests, caps)]
    found.append(continuous(cli.model(folder, given), requests, caps))
    print(tables.render([HEADER, *chain(*found)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
