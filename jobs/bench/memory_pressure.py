"""Measure what it costs to give memory back and take it again while rows decode.

    python -m jobs.bench.memory_pressure random:qwen2.5-1.5b --rows 256 --take 10
    python -m jobs.bench.memory_pressure packaged:SmolLM2-135M-Instruct --device cpu --context 90 --new 220 --take 0.3

In the middle of a run a neighbour takes some GB, keeps them for a while and releases them, twice. On a GPU the
neighbour is a separate process that takes memory piece by piece as it comes free, and the engine sees it like any other
process. On a CPU, where other programs come and go as well, memory is simulated: a fixed number of GB for the KV cache.
The report gives throughput, step times, rows and memory of each phase, and how many steps the engine took to release
memory and to return to its former number of rows.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch

from jobs.bench.lib import cli, tables
from rollout import Engine, SamplingParams
from rollout.headroom.fake import FakeHeadroom
from rollout.requests import Request, StepReport

_GB = 10**9
PHASES = ("before", "taken", "returned", "taken again", "returned again")

# One command per line; the answer gives its start and end on a clock that all processes share.
_NEIGHBOUR = """
import sys, time, torch
wanted, device = float(sys.argv[1]) * 1e9, sys.argv[2]
torch.zeros(1, device=device)
print("ready", flush=True)
taken = []
for line in sys.stdin:
    began = time.perf_counter()
    if line.strip() == "take":
        while sum(map(len, taken)) < wanted:
            try:
                taken.append(torch.ones(1 << 25, dtype=torch.uint8, device=device))
            except torch.OutOfMemoryError:
                time.sleep(0.002)
    else:
        taken.clear()
        torch.cuda.empty_cache()
    print(began, time.perf_counter(), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the engine."""

    phase: str
    """Phase in which the step began."""
    report: StepReport


class Process:
    """A process that takes memory of a GPU and releases it."""

    def __init__(self, take_gb: float, device: str) -> None:
        command = [sys.executable, "-c", _NEIGHBOUR, str(take_gb), device]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def tell(self, command: str) -> None:
        """Send ``take`` or ``give``; the process obeys while the engine keeps running."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()

    def _answer(self) -> list[str]:
        assert self._process.stdout is not None
        return self._process.stdout.readline().split()

    def waited(self) -> list[float]:
        """Return the seconds that each command took."""
        times = (map(float, self._answer()) for _ in PHASES[1:])
        return [ended - began for began, ended in times]

    def close(self) -> None:
        """End the process, which releases all its memory."""
        self._process.kill()
        self._process.communicate()


class Watcher:
    """Follow a run and make the neighbour take and release memory.

    Args:
        tell: does ``take`` or ``give``.
    """

    def __init__(self, tell: Callable[[str], None], steps_a_phase: int) -> None:
        self._tell, self._steps_a_phase = tell, steps_a_phase
        self.steps: list[Step] = []

    @property
    def done(self) -> bool:
        """Return whether all phases are over."""
        return len(self.steps) == len(PHASES) * self._steps_a_phase

    def on_step(self, report: StepReport) -> None:
        """Record one step; the callback of `Engine.run`."""
        if self.done:
            return
        self.steps.append(Step(PHASES[len(self.steps) // self._steps_a_phase], report))
        if not self.done and len(self.steps) % self._steps_a_phase == 0:
            self._tell("take" if PHASES[len(self.steps) // self._steps_a_phase].startswith("taken") else "give")


class Pretended:
    """Simulated memory, of which the engine holds what it last reported."""

    def __init__(self, memory_gb: float, take_gb: float) -> None:
        self.headroom = FakeHeadroom(int(memory_gb * _GB), held=lambda: self._held)
        self._take = int(take_gb * _GB)
        self._held = 0

    def tell(self, command: str) -> None:
        """Apply ``take`` or ``give`` at once."""
        self.headroom.taken_bytes = self._take if command == "take" else 0

    def saw(self, report: StepReport) -> None:
        """Record how many bytes the engine holds."""
        self._held = report.kv_bytes


def reaction(steps: Sequence[Step], phase: str) -> int | None:
    """Count the steps of a phase until it settles; on a GPU this includes the time that the neighbour needs.

    As it stays is the median of the phase's second half, for held bytes where memory was taken, for live rows where it
    was returned. None where that is never reached.
    """
    its = [step.report for step in steps if step.phase == phase]
    taken = phase.startswith("taken")
    values = [report.kv_bytes if taken else report.live_rows for report in its]
    stays = median(values[len(values) // 2 :])
    return next(
        (i for i, value in enumerate(values) if (value <= 1.02 * stays if taken else value >= 0.98 * stays)), None
    )


def lines(steps: Sequence[Step]) -> tables.Lines:
    """Return a table with one row per phase."""
    rows: list[list[str]] = [
        ["phase", "steps", "tok/s", "median ms", "99 % ms", "slowest ms", "rows", "preempted", "KV GB, least", "most",
         "steps to settle"]
    ]  # fmt: skip
    for phase in dict.fromkeys(step.phase for step in steps):
        its = [step.report for step in steps if step.phase == phase]
        times = sorted(report.step_ms for report in its)
        late = times[min(len(times) - 1, int(0.99 * len(times)))]
        settled = None if phase == "before" else reaction(steps, phase)
        rows.append(
            [
                phase,
                str(len(its)),
                f"{1e3 * sum(report.new_tokens for report in its) / sum(times):.0f}",
                *(f"{ms:.2f}" for ms in (median(times), late, times[-1])),
                f"{fmean(report.live_rows for report in its):.0f}",
                str(sum(report.preempted_rows for report in its)),
                f"{min(report.kv_bytes for report in its) / _GB:.2f}",
                f"{max(report.kv_bytes for report in its) / _GB:.2f}",
                "" if settled is None else str(settled),
            ]
        )
    return rows


def main() -> int:
    """Print figures by phase."""
    parser = cli.options("Takes memory from a running engine, and gives it back.")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=750, help="mean of the tokens generated, evenly from 1 to twice it")
    parser.add_argument("--take", type=float, default=10.0, help="GB")
    parser.add_argument("--memory", type=float, default=0.6, help="GB for keys and values, on a CPU")
    parser.add_argument("--steps", type=int, default=200, help="of a phase")
    given = parser.parse_args()
    model = cli.model(cli.folder(parser, given), given)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draws = torch.Generator().manual_seed(0)
    # Many more than live at once, so that the pool takes all the memory that there is.
    count = given.rows * (2 + 5 * given.steps // given.new)
    prompts = torch.randint(vocabulary, (count, given.context), generator=draws).tolist()
    lengths = torch.randint(1, 2 * given.new + 1, (count,), generator=draws).tolist()
    requests = [
        Request(str(i), ids, SamplingParams(max_new_tokens=length, ignore_eos=True))
        for i, (ids, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    if given.device == "cpu":
        pretended = Pretended(given.memory, given.take)
        watcher = Watcher(pretended.tell, given.steps)
        engine = Engine(model, None, max_rows=given.rows, headroom=pretended.headroom, reserve_fraction=0.0)
        follow(engine, requests, [pretended.saw, watcher.on_step], watcher)
    else:
        process = Process(given.take, given.device)
        try:
            watcher = Watcher(process.tell, given.steps)
            follow(Engine(model, None, max_rows=given.rows), requests, [watcher.on_step], watcher)
            if watcher.done:
                waited = ", ".join(f"{seconds:.3f}" for seconds in process.waited())
                print(f"The neighbour took, gave, took and gave {given.take} GB in {waited} s.\n")
        finally:
            process.close()
    print(tables.render(lines(watcher.steps)))
    if not watcher.done:
        print("error: the requests ended before the phases did; name fewer --steps", file=sys.stderr)
        return 1
    return 0


def follow(
    engine: Engine, requests: Sequence[Request], listeners: Sequence[Callable[[StepReport], None]], watcher: Watcher
) -> None:
    """Run until all phases are over or all requests are done."""

    def on_step(report: StepReport) -> None:
        for listener in listeners:
            listener(report)

    stream = engine.run(requests, on_step=on_step)
    try:
        for _ in stream:
            if watcher.done:
                break
    finally:
        stream.close()


if __name__ == "__main__":
    sys.exit(main())
