"""Compare engines alone and beside a busy program on the same cores: half of workload ``w2``.

    python -m jobs.bench.in_company MODEL --engines ours,openvino:64@bfloat16 --repeats 3

The busy program is one endless loop, of niceness 19 or of equal priority. It belongs to the engine's process session,
since Linux shares the cores between sessions first, and between programs within them. CPU only.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

from jobs.bench.compare_engines import seats
from jobs.bench.lib import engine_spec, random_models, tables, workload
from jobs.bench.lib.interleave import Bench
from jobs.bench.lib.seats import Seat

HALF = workload.Shape(requests=64, samples=8)
COMPANY: dict[str, int | None] = {"alone": None, "beside nice 19": 19, "beside an equal": 0}
"""Situations, and the niceness of the busy program."""


def accompanied(seat: Seat, niceness: int | None, folder: Path) -> Seat:
    """Return a seat whose Python starts a busy loop, which ends with the engine, and then becomes the engine."""
    if niceness is None:
        return seat
    script = folder / f"python-{niceness}-{Path(seat.python).parents[1].name}"
    loop = f"nice -n {niceness} sh -c 'while :; do :; done' &"
    script.write_text(f'#!/bin/sh\n{loop}\nexec {shlex.quote(seat.python)} "$@"\n', encoding="utf-8")
    script.chmod(0o700)
    return replace(seat, python=str(script))


def main() -> int:
    """Print the useful output tokens per second of each engine in each situation: medians."""
    parser = argparse.ArgumentParser(description="Compares engines beside a busy program.")
    parser.add_argument("model", help="model folder, Hub id, packaged:NAME, or random:NAME")
    parser.add_argument("--engines", default="ours", help="NAME[:ROWS][@DTYPE],…; peers need all three")
    parser.add_argument("--dtype", default="bfloat16", choices=engine_spec.DTYPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new", type=int, default=HALF.max_new, help="longest output")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    given = parser.parse_args()
    # The engine runs in a process session of its own, so ending this process must end it and its company.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        specs = [engine_spec.parse(text) for text in given.engines.split(",")]
        model = random_models.resolve(given.model)
    except ValueError as error:
        parser.error(str(error))
    peers = {name: Path(python).absolute() for name, _, python in (text.partition("=") for text in given.peer)}
    places, skipped = seats(specs, model, peers)
    for name, why in skipped.items():
        print(f"{name} is skipped: {why}", flush=True)
    specs = [spec for spec in specs if spec.name in places]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "workload.json"
        requests = workload.make(model, replace(HALF, max_new=given.max_new))
        workload.write(requests, file)
        print(workload.describe(requests), flush=True)
        longest = max(len(request.ids) + request.n for request in requests)
        benches = {}
        for situation, niceness in COMPANY.items():
            own = {name: accompanied(seat, niceness, folder) for name, seat in places.items()}
            benches[situation] = Bench(own, {situation: file}, longest, given.dtype, "cpu", folder)
        for _ in range(given.repeats):
            for situation, bench in benches.items():
                for spec in specs:
                    bench.run(situation, spec, spec)
    lines = []
    for spec in specs:
        rates = [
            [run.rate for run in bench.runs if run.engine == str(spec) and run.finished] for bench in benches.values()
        ]
        if all(rates):
            figures = [median(of) for of in rates]
            shares = [f"{figure:.0f} ({figure / figures[0]:.2f})" for figure in figures]
            lines.append((str(spec), *shares))
    print(tables.render([("engine", *(f"{situation} tok/s" for situation in COMPANY)), *lines]))
    return int(len(lines) < len(specs))


if __name__ == "__main__":
    sys.exit(main())
