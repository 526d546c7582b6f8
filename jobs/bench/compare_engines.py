"""Compare engines on workloads: each runs in a process of its own, in turns, and medians are reported.

    python -m jobs.bench.compare_engines MODEL --workload w1,w2 --engines ours,openvino,static:32 --repeats 3

An engine is ``NAME[:ROWS][@DTYPE]``; `jobs.bench.lib.engine_spec` says what becomes of
what is left out. Rates are useful output
tokens a second: the tokens that the workload asks for, over the wall time of the one call that generates them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.bench import peer_envs
from jobs.bench.lib import engine_spec, random_models, workload
from jobs.bench.lib import tables as table
from jobs.bench.lib.engine_spec import Spec
from jobs.bench.lib.hardware import hardware
from jobs.bench.lib.interleave import Bench
from jobs.bench.lib.seats import ROOT, Seat
from jobs.bench.lib.tables import Lines


def revision() -> str | None:
    """Return the commit of this checkout, or None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Compares engines on workloads.")
    parser.add_argument("model", help="model folder, Hub id, packaged:NAME, or random:NAME")
    named = ", ".join(workload.NAMED)
    parser.add_argument("--workload", default="w1", help=f"of {named}, or workload files; with commas between")
    parser.add_argument(
        "--engines", default="ours,static,continuous", help=f"NAME[:ROWS][@DTYPE],… of {', '.join(engine_spec.ENGINES)}"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=engine_spec.DTYPES, help="of engines that do not choose theirs"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"where one of {', '.join(peer_envs.PEERS)} is",
    )
    parser.add_argument(
        "--fraction",
        type=float,
        default=1.0,
        help="of each request's output tokens, for a machine that is quiet briefly",
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep an engine's process for all workloads of a turn, instead of one a run"
    )
    parser.add_argument(
        "--around",
        type=shlex.split,
        default=[],
        metavar="COMMAND",
        help="runs each measurement, as its last arguments, and makes the machine quiet meanwhile",
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--table", type=Path, help="write the tables to this file, as Markdown")
    given = parser.parse_args(arguments)
    try:
        given.engines = list(dict.fromkeys(engine_spec.parse(text) for text in given.engines.split(",")))
    except ValueError as error:
        parser.error(str(error))
    given.workload = given.workload.split(",")
    for name in given.workload:
        if name not in workload.NAMED and not Path(name).is_file():
            parser.error(f"no workload {name!r}; there are {named}, or name a file")
    if not 0 < given.fraction <= 1:
        parser.error(f"--fraction {given.fraction}: give a number above 0, up to 1")
    pairs = [text.partition("=") for text in given.peer]
    for name, _, python in pairs:
        if name not in peer_envs.PEERS or not Path(python).is_file():
            parser.error(f"--peer {name}={python}: give NAME=PYTHON, NAME of {', '.join(peer_envs.PEERS)}")
    # Keep the link unresolved: a virtual environment's Python is known by the link's place.
    given.peer = {name: Path(python).absolute() for name, _, python in pairs}
    return given


def seats(specs: list[Spec], model: str, given_peers: dict[str, Path]) -> tuple[dict[str, Seat], dict[str, str]]:
    """Return where each kind of engine runs, and why others are skipped."""
    found: dict[str, Seat] = {}
    skipped: dict[str, str] = {}
    for name in dict.fromkeys(asked.name for asked in specs):
        if not engine_spec.ENGINES[name].peer:
            found[name] = Seat(sys.executable, model)
            continue
        python = given_peers.get(name) or peer_envs.find(name)
        if python is None:
            skipped[name] = f"not installed: {peer_envs.hint(name)}"
            continue
        try:
            found[name] = Seat(str(python), peer_envs.model_for(name, python, model))
        except ValueError as error:
            skipped[name] = str(error)
    return found, skipped


def inputs(given: argparse.Namespace) -> tuple[str, dict[str, list[workload.Request]]]:
    """Return the model's folder, and the requests of each workload by name: a file's name without its ending.

    Raises:
        ValueError: there is no such model, or a file is no workload.
    """
    model = random_models.resolve(given.model)
    requests = {}
    for text in given.workload:
        shape = workload.NAMED.get(text)
        name = text if shape or Path(text).stem in requests else Path(text).stem
        entries = workload.make(model, shape) if shape else workload.read(Path(text))
        requests[name] = workload.shorten(entries, given.fraction)
    return model, requests


def versions(bench: Bench) -> dict[str, Any]:
    """Return the versions that each engine's own process reported, by kind of engine."""
    reports = {run["engine"]: run for run in bench.details if "versions" in run}
    return {
        engine_spec.parse(engine).name: {"python": run["python"], **run["versions"]} for engine, run in reports.items()
    }


def figures(bench: Bench, specs: list[Spec]) -> dict[str, Any]:
    """Return what has been measured so far."""
    ours = next((str(asked) for asked in specs if asked.name == engine_spec.OURS), None)
    return {
        "versions": versions(bench),
        "table": [asdict(row) for row in table.summarise(bench.counted, ours)],
        "first_tokens": [asdict(found) for found in table.first_tokens(bench.starts)],
        "runs": bench.details,
    }


def tables(found: dict[str, Any], form: Callable[[Lines], str]) -> str:
    """Return both tables, as text or as Markdown."""
    results = [table.cells(table.Row(**row)) for row in found["table"]]
    starts = [table.first_token_cells(table.FirstToken(**start)) for start in found["first_tokens"]]
    return form([table.RESULTS, *results]) + "\n\n" + form([table.FIRST_TOKENS, *starts])


def main() -> int:
    """Run the comparison; exit status 1 when a run failed, 2 when there is nothing to run."""
    given = parse()
    # The engine runs in a process session of its own, so ending this process must end it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        model, requests = inputs(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    places, skipped = seats(given.engines, model, given.peer)
    for name, why in skipped.items():
        print(f"{name} is skipped: {why}", flush=True)
    specs = [asked for asked in given.engines if asked.name in places]
    about = {
        "command": shlex.join(["python", "-m", "jobs.bench.compare_engines", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "hardware": hardware(),
        "device": given.device,
        "dtype": given.dtype,
        "fraction": given.fraction,
        "workloads": {name: workload.describe(entries) for name, entries in requests.items()},
        "skipped": skipped,
    }
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        files = {name: scratch / f"workload-{index}.json" for index, name in enumerate(requests)}
        for name, entries in requests.items():
            workload.write(entries, files[name])
            print(f"workload {name}: {workload.describe(entries)}", flush=True)
        longest = max(len(request.ids) + request.n for entries in requests.values() for request in entries)
        bench = Bench(places, files, longest, given.dtype, given.device, scratch, given.keep, given.around)
        with closing(bench):
            # Written after every turn: a comparison takes hours and may be stopped at any time.
            for _ in bench.compare(specs, given.repeats):
                found = figures(bench, specs)
                if given.json:
                    given.json.write_text(json.dumps(about | found, indent=1) + "\n", encoding="utf-8")
                if given.table:
                    given.table.write_text(tables(found, table.markdown) + "\n", encoding="utf-8")
    print("\n" + tables(figures(bench, specs), table.render))
    return int(any(run.error for run in bench.runs))


if __name__ == "__main__":
    sys.exit(main())
