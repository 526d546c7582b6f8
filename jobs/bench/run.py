"""Runs engines on one workload, turn by turn, each in a process of its own, and compares their medians.

    python jobs/bench/run.py MODEL --workload w1 --engines ours,static:32,continuous --repeats 3 --json result.json

A number after an engine's name is the most rows in its batch. Rates are useful output tokens a second:
the tokens that the workload asks for, over the wall time of the one call that generates them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import workload
from table import Run, render, summarise

HERE = Path(__file__).resolve().parent
ENGINES = {"ours": "ours", "static": "transformers_static", "continuous": "transformers_continuous"}
"""Names on the command line, and the modules of ``engines/`` that they stand for."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every engine is given alike."""

    model: str
    workload: Path
    dtype: str
    device: str


def run_once(engine: str, plan: Plan, out: Path) -> tuple[Run, dict[str, Any]]:
    """One run of one engine: the figures for the table, and all there is to keep of it."""
    name, _, cap = engine.partition(":")
    command = [sys.executable, "-m", f"engines.{ENGINES[name]}", plan.model, str(plan.workload), str(out)]
    command += ["--dtype", plan.dtype, "--device", plan.device, *(["--cap", cap] if cap else [])]
    # Other work on the machine is the largest error of all, so it is kept with the figures.
    kept: dict[str, Any] = {"engine": engine, "command": shlex.join(command), "load_average": os.getloadavg()}
    out.unlink(missing_ok=True)
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode or not out.exists():
        lines = done.stderr.strip().splitlines()
        error = lines[-1] if lines else f"exit status {done.returncode}"
        return Run(engine, error=error), {**kept, "error": error, "stderr": lines[-40:]}
    result = json.loads(out.read_text(encoding="utf-8"))
    run = Run(engine, result["tokens"], result["seconds"], result["peak_rss_bytes"])
    return run, {**kept, **result}


def hardware() -> dict[str, Any]:
    """What the figures were taken on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "memory_bytes": psutil.virtual_memory().total, "system": platform.platform()}


def revision() -> str | None:
    """The commit of this checkout; None where there is none."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compares engines on one workload.")
    parser.add_argument("model", help="model folder, Hub id, or packaged:NAME")
    named = ", ".join(workload.NAMED)
    parser.add_argument("--workload", default="w1", help=f"{named}, or a workload file")
    parser.add_argument("--engines", default="ours,static:32,continuous", help=f"of: {', '.join(ENGINES)}")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    given = parser.parse_args()
    given.engines = given.engines.split(",")
    for engine in given.engines:
        name, _, cap = engine.partition(":")
        if name not in ENGINES or (cap and not cap.isdigit()):
            parser.error(f"no engine {engine!r}; there are {', '.join(ENGINES)}, with a cap on rows after a colon")
    if given.workload not in workload.NAMED and not Path(given.workload).is_file():
        parser.error(f"no workload {given.workload!r}; there are {named}, or name a file")
    return given


def inputs(given: argparse.Namespace) -> tuple[str, list[workload.Request]]:
    """The model's folder and the requests.

    Raises:
        ValueError: there is no such model, or the file is no workload.
    """
    from rollout.models.load import resolve_path  # slow to import, and not needed to refuse a mistyped command

    model = resolve_path(given.model)
    shape = workload.NAMED.get(given.workload)
    requests = workload.read(Path(given.workload)) if shape is None else workload.make(model, shape)
    # Engines run in a directory of their own.
    return str(Path(model).resolve()), requests


def main() -> int:
    """Exit status 1 when a run failed, 2 when there is nothing to run."""
    given = parse()
    try:
        model, requests = inputs(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    runs: list[Run] = []
    details: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "workload.json"
        workload.write(requests, path)
        print(f"workload {given.workload}: {workload.describe(requests)}; {given.dtype} on {given.device}", flush=True)
        plan = Plan(model, path, given.dtype, given.device)
        # Turn by turn, so that a change in the machine's speed meets all engines alike.
        for repeat in range(given.repeats):
            for engine in given.engines:
                run, kept = run_once(engine, plan, Path(scratch) / "result.json")
                runs.append(run)
                details.append(kept)
                said = f"failed: {run.error}" if run.error else f"{run.rate:.1f} tok/s ({run.seconds:.1f} s)"
                print(f"  {repeat + 1}/{given.repeats} {engine}: {said}", flush=True)
    rows = summarise(runs)
    print(render(rows))
    if given.json:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "workload": {"name": given.workload, "description": workload.describe(requests)},
            "dtype": given.dtype,
            "device": given.device,
            "hardware": hardware(),
            "revision": revision(),
            "table": [asdict(row) for row in rows],
            "runs": details,
        }
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"figures in {given.json}")
    return int(any(run.error for run in runs))


if __name__ == "__main__":
    sys.exit(main())
