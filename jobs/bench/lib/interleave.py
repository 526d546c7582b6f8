"""Run engines in turns, each in a process of its own, and keep their results."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.bench.lib import engine_spec
from jobs.bench.lib.engine_spec import Spec
from jobs.bench.lib.seats import EngineProcess, Reply, Seat
from jobs.bench.lib.tables import Run, Start


@dataclass(slots=True)
class Loaded:
    """An engine that is ready to run."""

    process: EngineProcess
    report: dict[str, Any]


@dataclass(slots=True)
class Bench:
    """The runs of one comparison and their results.

    Args:
        seats: by kind of engine.
        workloads: files by name.
        longest: tokens of the longest request in them.
        dtype: of engines that neither are given one nor choose it.
        scratch: a folder for what is not kept.
        keep: whether an engine's process stays for all workloads of a turn; else every run has one of its own.
        around: words before the command of each measurement.
    """

    seats: dict[str, Seat]
    workloads: dict[str, Path]
    longest: int
    dtype: str
    device: str
    scratch: Path
    keep: bool = False
    around: Sequence[str] = ()
    runs: list[Run] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    settled: dict[tuple[str, Spec], Spec] = field(default_factory=dict)
    """The setting that is repeated, by workload and engine."""
    loaded: dict[tuple[Spec, Spec], Loaded] = field(default_factory=dict)
    """Engines whose processes are kept, by engine and setting."""

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
            self.close()

    def close(self) -> None:
        """End all processes."""
        while self.loaded:
            self.loaded.popitem()[1].process.stop()

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
        run, key = Run(name, str(asked), str(setting)), (asked, setting)
        ready = self.loaded.pop(key, None) or self.start(name, asked, setting)
        if isinstance(ready, Reply):
            return self.record(replace(run, error=ready.error[-1]), ready, {})
        # Kept where `close` finds it, whatever happens meanwhile.
        self.loaded[key] = ready
        reply, about = ready.process.run(self.workloads[name], limit), {**ready.report, "command": str(ready.process)}
        if reply.found:
            found = dict(reply.found)
            figures = {figure: found.pop(figure) for figure in ("tokens", "prompt_tokens", "seconds")}
            peak = max(found.pop("peak_bytes"), ready.report["peak_bytes"])
            run, about = replace(run, **figures, peak_rss_bytes=peak), about | found
        elif reply.cut:
            run = replace(run, cut=True)
        else:
            run = replace(run, error=reply.error[-1])
        if not (self.keep and run.finished):
            self.loaded.pop(key).process.stop()
        return self.record(run, reply, about)

    def start(self, name: str, asked: Spec, setting: Spec) -> Loaded | Reply:
        """Load an engine; return it, or the reply of one that failed."""
        options = ["--dtype", setting.dtype or self.dtype, "--device", self.device, "--longest", str(self.longest)]
        options += ["--cap", str(setting.cap)] if setting.cap else []
        # Use separate, empty caches: the cost of a first start shows, and the user's caches stay untouched.
        cache = self.scratch / "caches" / str(asked)
        cache.mkdir(parents=True, exist_ok=True)
        own = {"XDG_CACHE_HOME": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "HF_HUB_OFFLINE": "1"}
        own["TRITON_CACHE_DIR"] = str(cache / "triton")
        process = EngineProcess(
            self.seats[asked.name], asked.engine.module, options, {**os.environ, **own}, self.around
        )
        loaded = Loaded(process, {})
        self.loaded[asked, setting] = loaded
        reply = process.load(self.workloads[name])
        del self.loaded[asked, setting]
        if reply.found is None:
            process.stop()
            return reply
        loaded.report |= reply.found
        start = Start(str(asked), str(setting), reply.found["first_token_seconds"], reply.noise.noisy)
        self.starts.append(start)
        print(f"  {start}", flush=True)
        return loaded

    def record(self, run: Run, reply: Reply, about: dict[str, Any]) -> Run:
        """Print and keep the result of a run."""
        run = replace(run, noisy=reply.noise.noisy)
        print(f"  {run.workload}  {run}", flush=True)
        self.runs.append(run)
        errors = {"stderr": list(reply.error)} if reply.error else {}
        self.details.append({**asdict(run), **asdict(reply.noise), **about, **errors})
        return run
