"""Run engines in turns, each in a process of its own, and keep their results."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.bench.lib import engine_spec
from jobs.bench.lib.engine_spec import Spec
from jobs.bench.lib.hardware import Watch
from jobs.bench.lib.tables import Run

ROOT = Path(__file__).resolve().parents[3]
"""The checkout. Engines run there, so that a peer's Python finds them although this project is not installed in it."""


@dataclass(frozen=True, slots=True)
class Seat:
    """The Python and the model of an engine."""

    python: str
    model: str
    """The model's folder, or an export of it."""


@dataclass(slots=True)
class Bench:
    """The runs of one comparison and their results.

    Args:
        seats: by kind of engine.
        workloads: files by name.
        dtype: of engines that neither are given one nor choose it.
        scratch: a folder for what is not kept.
    """

    seats: dict[str, Seat]
    workloads: dict[str, Path]
    dtype: str
    device: str
    scratch: Path
    runs: list[Run] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    settled: dict[tuple[str, Spec], Spec] = field(default_factory=dict)
    """The setting that is repeated, by workload and engine."""

    def compare(self, specs: list[Spec], repeats: int) -> Iterator[None]:
        """Run all engines on all workloads in turns, so that a change of the machine's speed affects all alike.

        Yields after each turn of an engine.
        """
        for repeat in range(repeats):
            print(f"turn {repeat + 1} of {repeats}", flush=True)
            for name in self.workloads:
                for asked in specs:
                    self.turn(name, asked)
                    yield

    def turn(self, name: str, asked: Spec) -> None:
        """Run an engine once; the first time, once per setting to try."""
        if (name, asked) in self.settled:
            self.run(name, asked, self.settled[name, asked])
            return

        def attempt(setting: Spec, limit: float | None) -> float | None:
            run = self.run(name, asked, setting, limit)
            return run.seconds if run.finished else None

        self.settled[name, asked] = engine_spec.settle(asked, self.dtype, attempt)

    @property
    def counted(self) -> list[Run]:
        """Return the runs of the chosen settings."""
        chosen = {(name, str(asked)): str(setting) for (name, asked), setting in self.settled.items()}
        return [run for run in self.runs if chosen.get((run.workload, run.engine)) == run.setting]

    def run(self, name: str, asked: Spec, setting: Spec, limit: float | None = None) -> Run:
        """Run one engine; stop it after ``limit`` seconds of generation."""
        out, seat = self.scratch / "result.json", self.seats[asked.name]
        module = f"jobs.bench.engines.{asked.engine.module}"
        command = [seat.python, "-m", module, seat.model, str(self.workloads[name]), str(out)]
        command += ["--dtype", setting.dtype or self.dtype, "--device", self.device]
        command += ["--cap", str(setting.cap)] if setting.cap else []
        command += ["--limit", f"{limit:.1f}"] if limit else []
        # Use separate, empty caches: the cost of a first start shows, and the user's caches stay untouched.
        cache = self.scratch / "caches" / str(asked)
        cache.mkdir(parents=True, exist_ok=True)
        own = {"XDG_CACHE_HOME": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "HF_HUB_OFFLINE": "1"}
        own["TRITON_CACHE_DIR"] = str(cache / "triton")
        out.unlink(missing_ok=True)
        watch, started = Watch(), time.time()
        code, stderr = execute(command, {**os.environ, **own})
        noise = watch.noise()
        run, kept = Run(name, str(asked), str(setting), noisy=noise.noisy), dict[str, Any]()
        if code == -signal.SIGALRM:
            run = replace(run, cut=True)
        elif code or not out.exists():
            lines = stderr.strip().splitlines() or [f"exit status {code}"]
            run, kept = replace(run, error=lines[-1]), {"stderr": lines[-40:]}
        else:
            kept = json.loads(out.read_text(encoding="utf-8"))
            figures = {key: kept.pop(key) for key in ("tokens", "prompt_tokens", "seconds", "peak_rss_bytes")}
            run = replace(run, setup_seconds=kept.pop("ready_at") - started, **figures)
        print(f"  {name}  {run}", flush=True)
        self.runs.append(run)
        self.details.append({**asdict(run), **asdict(noise), "command": shlex.join(command), **kept})
        return run


def execute(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run a process and its children; return exit status and standard error."""
    # Use a file, not a pipe: reading a pipe would wait for children that keep it open.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
        try:
            code = process.wait()
        finally:
            with suppress(ProcessLookupError):  # as it should be
                os.killpg(process.pid, signal.SIGKILL)
        errors.seek(0)
        return code, errors.read()
