"""Processes of engines: each loads when told, stays loaded, and runs one workload at a time.

What is measured happens while `lib.ask` waits for it in a process of its own. That process may be wrapped in a command
that makes the machine quiet for the time, such as one that stops all other work in a project's folder; engines
therefore work in a scratch folder, and keep still between commands.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.bench.lib.hardware import Noise

ROOT = Path(__file__).resolve().parents[3]
"""The checkout. It is on the path of engines, so that a peer's Python finds them although it has no such package."""

HARNESS = "jobs.bench.engines.harness"

ENDING = 10.0
"""Seconds in which a process that closed its socket must have ended."""


@dataclass(frozen=True, slots=True)
class Seat:
    """The Python and the model of an engine."""

    python: str
    model: str
    """The model's folder, or an export of it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one command."""

    noise: Noise
    found: dict[str, Any] | None = None
    """The engine's own report; None when it failed or was stopped."""
    cut: bool = False
    """Whether it was stopped because it took too long."""
    error: tuple[str, ...] = ()
    """Its last words when it failed."""
    unfinished: bool = False
    """Whether what wrapped the measurement stopped it, while the engine goes on with its work."""


class EngineProcess:
    """An engine's process, from its start to `stop`.

    Args:
        seat: of the engine.
        module: of the engine, in ``jobs.bench.engines``.
        options: for its `harness`.
        environment: of the process.
        around: words before the command of each measurement.
    """

    def __init__(
        self,
        seat: Seat,
        module: str,
        options: Sequence[str],
        environment: dict[str, str],
        around: Sequence[str] = (),
    ) -> None:
        self._around = list(around)
        self._folder = tempfile.TemporaryDirectory(prefix="seat")
        self._work = Path(self._folder.name)
        self._socket = self._work / "socket"
        served = f"jobs.bench.engines.{module}"
        self._command = [seat.python, "-m", HARNESS, served, seat.model, str(self._socket), *options]
        path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
        # Files, not pipes: reading a pipe would wait for children that keep it open.
        with (self._work / "stderr").open("wb") as errors:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._work,
                env={**environment, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )

    def __str__(self) -> str:
        return shlex.join(self._command)

    def load(self, workload: Path) -> Reply:
        """Load the engine and generate the first token of a workload."""
        command = {"do": "load", "workload": str(workload)}
        reply = self._tell(command, self._around)
        if not reply.unfinished:
            return reply
        # It goes on loading; how long it has taken by then is a figure with noise in it.
        return replace(self._tell(command, []), noise=Noise(0.0, 0.0, 1.0))

    def run(self, workload: Path, limit: float | None = None) -> Reply:
        """Run a workload; end the process after ``limit`` seconds of generation."""
        return self._tell({"do": "run", "workload": str(workload), "limit": limit}, self._around)

    def stop(self) -> None:
        """End the process and its children."""
        with suppress(ProcessLookupError):  # as it should be
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()

    def _tell(self, command: dict[str, Any], around: list[str]) -> Reply:
        out = self._work / "reply.json"
        out.unlink(missing_ok=True)
        asking = [sys.executable, "-m", "jobs.bench.lib.ask", str(self._socket), json.dumps(command), str(out)]
        done = subprocess.run(
            [*around, *asking, "--pid", str(self._process.pid)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if not out.exists():
            said = [*done.stdout.strip().splitlines()[-1:], f"the measurement ended with exit status {done.returncode}"]
            return Reply(Noise(0.0, 0.0, 0.0), error=(": ".join(said),), unfinished=True)
        found = json.loads(out.read_text(encoding="utf-8"))
        noise = Noise(**found.pop("noise"))
        if found:
            return Reply(noise, found)
        code = self._ended()
        if code == -signal.SIGALRM:
            return Reply(noise, cut=True)
        lines = (self._work / "stderr").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return Reply(noise, error=tuple(lines[-40:]) or (f"exit status {code}",))

    def _ended(self) -> int | None:
        until = time.monotonic() + ENDING
        while self._process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        return self._process.returncode
