"""What it costs to give memory back and take it again while rows decode.

    python jobs/bench/squeeze.py random:qwen2.5-1.5b --rows 256 --take 10

A process of its own takes so many GB of the GPU in the middle of a run, piece by piece as they come free, keeps them
for a while and lets them go; the engine sees it as it sees any neighbour, in the driver's figures. Told are step times
before, meanwhile and after, and how long the neighbour waited until it had them all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import random_models
import table
import torch
from engines.harness import Task
from engines.loading import load

from rollout import Engine, SamplingParams
from rollout.requests import Request, StepReport

CONTEXT = 1024
NEW_TOKENS = 1500
SETTLE_STEPS = 200
"""Decode steps before memory is taken, and again before it is let go."""

_NEIGHBOUR = """
import sys, time, torch
wanted, taken, device = float(sys.argv[1]) * 1e9, [], sys.argv[2]
torch.zeros(1, device=device)
began = time.perf_counter()
while sum(map(len, taken)) < wanted:
    try:
        taken.append(torch.empty(1 << 27, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError:
        time.sleep(0.002)
print(time.perf_counter() - began, flush=True)
sys.stdin.read()
"""


@dataclass(slots=True)
class Watcher:
    """Follows a run, and has a neighbour take memory and let it go."""

    take_gb: float
    device: str
    times: list[tuple[str, float, int]] = field(default_factory=list)
    """Of each step: the phase it began in, when it ended, and KV bytes held."""
    phase: str = "before"
    steps: int = 0
    """In this phase."""
    waited: float | None = None
    """Seconds until the neighbour had all its memory."""
    _neighbour: subprocess.Popen[str] | None = None

    def on_step(self, report: StepReport) -> None:
        """For `Engine.run`."""
        self.times.append((self.phase, time.perf_counter(), report.kv_bytes))
        self.steps += 1
        if self.steps < SETTLE_STEPS:
            return
        if self.phase == "before":
            command = [sys.executable, "-c", _NEIGHBOUR, str(self.take_gb), self.device]
            self._neighbour = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.phase, self.steps = "meanwhile", 0
        elif self.phase == "meanwhile":
            self.close()
            self.phase, self.steps = "after", 0

    def close(self) -> None:
        """The neighbour goes."""
        if self._neighbour is not None:
            said, _ = self._neighbour.communicate()
            self.waited = float(said) if said else None
            self._neighbour = None


def lines(times: Sequence[tuple[str, float, int]]) -> table.Lines:
    """A table of step times by phase: milliseconds."""
    rows: list[tuple[str, ...]] = [("phase", "steps", "median ms", "99 % ms", "slowest ms", "KV GB, least", "most")]
    steps = [(phase, at - before, held) for (_, before, _), (phase, at, held) in pairwise(times)]
    for phase in dict.fromkeys(phase for phase, _, _ in steps):
        taken = sorted(seconds for its, seconds, _ in steps if its == phase)
        held = [bytes_ for its, _, bytes_ in steps if its == phase]
        late = taken[min(len(taken) - 1, int(0.99 * len(taken)))]
        figures = (median(taken), late, taken[-1])
        ends = (f"{min(held) / 1e9:.2f}", f"{max(held) / 1e9:.2f}")
        rows.append((phase, str(len(taken)), *(f"{1e3 * seconds:.2f}" for seconds in figures), *ends))
    return rows


def main() -> int:
    """Prints step times by phase."""
    parser = argparse.ArgumentParser(description="Takes memory from a running engine, and gives it back.")
    parser.add_argument("model", help="model folder, Hub id, packaged:NAME, or random:NAME")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--take", type=float, default=10.0, help="GB")
    given = parser.parse_args()
    try:
        folder = random_models.resolve(given.model)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    model: Any = load(Task(folder, given.dtype, given.device, None, []))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draws = torch.Generator().manual_seed(0)
    # Many more than live at once, so that the pool takes all the memory that there is.
    prompts = torch.randint(vocabulary, (8 * given.rows, CONTEXT), generator=draws).tolist()
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    watcher = Watcher(given.take, given.device)
    stream = Engine(model, None, max_rows=given.rows).run(
        [Request(str(i), ids, params) for i, ids in enumerate(prompts)], on_step=watcher.on_step
    )
    try:
        for _ in stream:
            if watcher.phase == "after" and watcher.steps >= SETTLE_STEPS:
                break
    finally:
        stream.close()  # type: ignore[attr-defined]
        watcher.close()
    print(table.render(lines(watcher.times)))
    waited = "never had them" if watcher.waited is None else f"had them after {watcher.waited:.3f} s"
    print(f"\nThe neighbour asked for {given.take} GB, and {waited}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
