"""Compare decode steps with the bandwidth of a device, and measure how long it waits between kernels.

    python -m jobs.bench.decode_bandwidth random:qwen2.5-1.5b --rows 64,256 --context 1024

The engine runs unchanged on rows that only decode. The bound of a step is one read of every weight and of the keys and
values of all rows, at the bandwidth of copying one large tensor to another. The first run is timed; on a GPU a second,
profiled run gives the time in kernels per step and their names. The rest of the step is the gap.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn

from jobs.bench.lib import cli, tables
from rollout import Engine, SamplingParams
from rollout.batcher.policies.static import StaticPolicy
from rollout.batcher.types import Bounds
from rollout.models.runners.select import select_strategy
from rollout.requests import Request, StepReport

STEPS = 64
"""Decode steps that are measured for one number of rows."""
WARM_UP = 8
"""Decode steps before them: first calls allocate, compile and capture."""
PREFILL_TOKENS = 1 << 17
"""Most prompt tokens of a step."""
PROFILED = 16
"""Steps that are profiled."""
COPY_BYTES = {"cuda": 1 << 31, "cpu": 1 << 28}
TOP = 8
"""Kernels that are named."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Steps that decode ``rows`` rows of ``context`` tokens."""

    rows: int
    context: float
    """Mean tokens per row that a step reads."""
    seconds: float
    """Median seconds per step."""
    slowest: float
    first_seconds: float
    """Seconds from the call to the end of its first step, compilation and capture included."""
    bound: float
    """Seconds per step at the bandwidth of a copy."""
    bytes: float
    """Bytes that a step reads."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Activity of the device over some steps."""

    busy: float
    """Seconds per step in which any kernel ran."""
    kernels: tuple[tuple[str, float], ...]
    """Seconds per step and kernel, the longest first."""
    launches: float
    """Kernels per step; copies and fills are none."""


class Decoding:
    """One run of the engine in which all rows decode together for some steps.

    Args:
        model: on its device.
        rows, context: how many rows, of how many tokens halfway through the measured steps.
        steps: how many are measured.
        around: called with the number of each measured step, before it, and once after the last.
        options: further ones of the engine.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        context: int,
        steps: int,
        around: Callable[[int], None] = lambda _: None,
        **options: Any,
    ) -> None:
        self._rows, self._steps, self._around = rows, steps, around
        self._alone = 0
        self.times: list[float] = []
        """End of each measured step, and of the one before them."""
        self.tokens: list[int] = []
        """Tokens that the pages of all rows have room for, in each measured step."""
        new = WARM_UP + steps + 4
        vocabulary = model.get_input_embeddings().weight.shape[0]
        draws = torch.Generator().manual_seed(0)
        length = max(1, context - WARM_UP - steps // 2)
        prompts = torch.randint(vocabulary, (rows, length), generator=draws).tolist()
        params = SamplingParams(max_new_tokens=new, ignore_eos=True)
        # Rows join in few steps, or the first would end before the last join.
        policy = StaticPolicy(Bounds(max_rows=rows, prefill_tokens=PREFILL_TOKENS))
        engine = Engine(model, None, policy=policy, max_rows=rows, **options)
        self._began = time.perf_counter()
        self.first_seconds = 0.0
        for _ in engine.run([Request(str(i), ids, params) for i, ids in enumerate(prompts)], on_step=self._step):
            pass
        if len(self.times) <= steps:
            raise ValueError(f"only {max(0, len(self.times) - 1)} steps decoded {rows} rows: is there memory for them?")

    def _step(self, report: StepReport) -> None:
        now = time.perf_counter()
        self.first_seconds = self.first_seconds or now - self._began
        if report.prefill_tokens or report.live_rows < self._rows or report.new_tokens < self._rows:
            return
        self._alone += 1
        if WARM_UP <= self._alone <= WARM_UP + self._steps:
            self._around(self._alone - WARM_UP)
            if self._alone > WARM_UP:
                self.tokens.append(report.kv_tokens)
            # Restart the clock: work around a step is not part of it.
            self.times.append(now if self._alone > WARM_UP else time.perf_counter())


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model that a step reads: all parameters, but an untied input embedding only in part."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    skipped = None if output is not None and output.weight is embedding.weight else embedding.weight
    return sum(x.numel() * x.itemsize for x in model.parameters() if x is not skipped)


def copy_bandwidth(device: torch.device) -> float:
    """Measure bytes per second read and written while one large tensor is copied to another."""
    size = COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        _finish(device)
        began = time.perf_counter()
        target.copy_(source)
        _finish(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size / best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(model: Any, rows: int, context: int, bandwidth: float, steps: int = STEPS) -> Measured:
    """Time steps without a profiler."""
    run = Decoding(model, rows, context, steps)
    durations = [after - before for before, after in pairwise(run.times)]
    layout = select_strategy(model).kv_layout()
    # Pages are counted whole; on average half of the last one of each row is empty.
    tokens = sum(run.tokens) / len(run.tokens) - rows * (layout.page_size - 1) / 2
    read = weight_bytes(model) + tokens * layout.bytes_per_token
    return Measured(
        rows=rows,
        context=tokens / rows,
        seconds=median(durations),
        slowest=max(durations),
        first_seconds=run.first_seconds,
        bound=read / bandwidth,
        bytes=read,
    )


def profile(model: Any, rows: int, context: int, **options: Any) -> Profile:
    """Profile the kernels of a step on a GPU; ``options`` are the engine's."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    recorder: Any = profiler(activities=[ProfilerActivity.CUDA])

    def around(step: int) -> None:
        if step == 0:
            recorder.start()
        elif step == PROFILED:
            recorder.stop()

    Decoding(model, rows, context, PROFILED, around, **options)
    spans = [
        (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in recorder.events()
        if event.device_type.name != "CPU"
    ]
    return busy(spans, PROFILED)


def busy(spans: Sequence[tuple[str, float, float]], steps: int) -> Profile:
    """Sum (kernel, start, end) over ``steps`` steps; overlapping time counts once."""
    total, reached, launches = 0.0, float("-inf"), 0
    by_name = Counter[str]()
    for name, start, end in sorted(spans, key=lambda span: span[1]):
        launches += not name.startswith(("Memcpy", "Memset"))
        by_name[name] += end - start  # type: ignore[assignment]
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    kernels = tuple((name, seconds / steps) for name, seconds in by_name.most_common())
    return Profile(total / steps, kernels, launches / steps)


HEADER = (
    "rows",
    "context",
    "step ms",
    "slowest",
    "bound ms",
    "bound / step",
    "GB/s",
    "kernels ms",
    "gap",
    "first step s",
)


def line(measured: Measured, found: Profile | None) -> tuple[str, ...]:
    """Return a row under `HEADER`."""
    gap = None if found is None else max(0.0, 1 - found.busy / measured.seconds)
    return (
        str(measured.rows),
        f"{measured.context:.0f}",
        f"{1e3 * measured.seconds:.3f}",
        f"{1e3 * measured.slowest:.3f}",
        f"{1e3 * measured.bound:.3f}",
        f"{100 * measured.bound / measured.seconds:.1f} %",
        f"{measured.bytes / measured.seconds / 1e9:.1f}",
        "-" if found is None else f"{1e3 * found.busy:.3f}",
        "-" if gap is None else f"{100 * gap:.1f} %",
        f"{measured.first_seconds:.1f}",
    )


def main() -> int:
    """Print a line per number of rows, and on a GPU the costliest kernels of a step."""
    parser = cli.options("Compares decode steps with the bandwidth of the device.")
    parser.add_argument("--rows", default="64,256", help="numbers of rows, with commas between")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a row")
    given = parser.parse_args()
    folder = cli.folder(parser, given)
    device = torch.device(given.device)
    bandwidth = copy_bandwidth(device)
    model = cli.model(folder, given)
    lines: list[tuple[str, ...]] = [HEADER]
    profiles = dict[int, Profile]()
    for rows in map(int, given.rows.split(",")):
        measured = measure(model, rows, given.context, bandwidth)
        if device.type == "cuda":
            profiles[rows] = profile(model, rows, given.context)
        lines.append(line(measured, profiles.get(rows)))
    print(tables.render(lines))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"\n{where}: copies at {bandwidth / 1e9:.0f} GB/s; attention: {Engine(model, None).attention}")
    for rows, found in profiles.items():
        print(f"\n{rows} rows, of a step:")
        for name, seconds in found.kernels[:TOP]:
            print(f"  {1e3 * seconds:8.3f} ms  {name[:100]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
