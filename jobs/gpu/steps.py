"""Measure steps of a model: share of the bandwidth bound, launches and gaps, graphs, rows that come and go, prefills.

python -m jobs.gpu.steps qwen2.5-1.5b
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from jobs.bench import decode_bandwidth as bench
from jobs.bench.lib.spies import Spies, watched
from jobs.gpu.common import CUDA, DEVICE, OUT, TINY, ended, guarded, random_model, say, start, synchronize
from rollout import Engine, SamplingParams
from rollout.models.runners import cuda_graphs
from rollout.models.runners.select import select_strategy
from rollout.requests import Request, StepReport

ROWS = (3, 5) if TINY else (64, 256)
CONTEXT = 40 if TINY else 1024
STEPS = 6 if TINY else 48
KERNELS_NAMED = 10


@contextmanager
def without_graphs() -> Iterator[None]:
    """Run every step eagerly."""
    module: Any = cuda_graphs
    kept = module.with_cuda_graphs
    module.with_cuda_graphs = lambda eager, *_args, **_kwargs: eager
    try:
        yield
    finally:
        module.with_cuda_graphs = kept


class Steps:
    """Decode steps of one model.

    Args:
        model: on the device.
        spies: watch the engine.
    """

    def __init__(self, model: Any, spies: Spies) -> None:
        self._model, self._spies = model, spies
        self._bandwidth = bench.copy_bandwidth(DEVICE)
        self._layout = select_strategy(model).kv_layout()
        weights = bench.weight_bytes(model)
        say(f"# copies at {self._bandwidth / 1e9:.0f} GB/s; weights {weights / 1e9:.2f} GB")

    def measure(self, rows: int, label: str, **options: Any) -> float:
        """Report the steps of so many rows; return the median seconds. ``options`` are the engine's."""
        self._spies.clear()
        began = time.perf_counter()
        run = bench.Decoding(self._model, rows, CONTEXT, STEPS, **options)
        durations = [after - before for before, after in pairwise(run.times)]
        # On average half of the last page of each row is empty.
        tokens = sum(run.tokens) / len(run.tokens) - rows * (self._layout.page_size - 1) / 2
        bound = (bench.weight_bytes(self._model) + tokens * self._layout.bytes_per_token) / self._bandwidth
        seconds = median(durations)
        host = seconds - median(self._spies.waits[-STEPS - 3 : -3] or [0.0])
        say(
            f"  {label:7s} rows {rows:4d} context {tokens / rows:.0f}: step {1e3 * seconds:.3f} ms"
            f" (min {1e3 * min(durations):.3f}, max {1e3 * max(durations):.3f});"
            f" bound {1e3 * bound:.3f} = {100 * bound / seconds:.1f} %; host {1e3 * host:.2f} ms;"
            f" {rows / seconds:.0f} tok/s; first step {run.first_seconds:.2f} s of {time.perf_counter() - began:.1f} s"
        )
        if CUDA:
            say(f"    {self._spies}")
        return seconds

    def profiled(self, rows: int, label: str, named: int = KERNELS_NAMED, **options: Any) -> None:
        """Measure, and profile what kernels run in a step."""
        seconds = self.measure(rows, label, **options)
        if not CUDA:
            return
        found = bench.profile(self._model, rows, CONTEXT, **options)
        gap = 100 * max(0.0, 1 - found.busy / seconds)
        layers = self._model.config.num_hidden_layers
        say(
            f"    kernels {1e3 * found.busy:.3f} ms of {1e3 * seconds:.3f}: gaps {gap:.0f} %;"
            f" {found.launches:.0f} launches, {found.launches / layers:.1f} a layer"
        )
        for name, spent in found.kernels[:named]:
            say(f"      {1e3 * spent:7.3f} ms  {name[:70]}")

    def eager(self, rows: int) -> None:
        """Measure without graphs."""
        with without_graphs():
            self.measure(rows, "eager")


def written_profile(call: Callable[[], object], order: str, name: str) -> None:
    """Write where the host spends the time of a call."""
    profile = cProfile.Profile()
    profile.runcall(call)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats(order).print_stats(45)
    (OUT / name).write_text(text.getvalue(), encoding="utf-8")


def flow(model: Any, spies: Spies) -> None:
    """Measure steps while rows end and others join all the time, in two calls of one engine."""
    rows, mean = (3, 6) if TINY else (128, 128)
    engine = Engine(model, None, max_rows=rows)
    draws = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 2 * mean, (4 * rows,), generator=draws).tolist()
    prompts = torch.randint(3, 150, (4 * rows, 48 if TINY else 100), generator=draws).tolist()
    for turn in (1, 2):
        reports: list[StepReport] = []
        requests = [
            Request(str(index), prompt, SamplingParams(max_new_tokens=length, ignore_eos=True), 0)
            for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        spies.clear()
        began = time.perf_counter()
        for _ in engine.run(requests, on_step=reports.append):
            pass
        synchronize()
        seconds = time.perf_counter() - began
        kinds = [[report.step_ms for report in reports if bool(report.prefill_tokens) == mixed] for mixed in (0, 1)]
        decodes, mixed = (f"{len(times)} of {median(times or [0.0]):.2f} ms" for times in kinds)
        say(
            f"    {rows} rows of flow, call {turn}: {sum(lengths) / seconds:.0f} tok/s in {seconds:.2f} s; steps:"
            f" {decodes}, with prefills {mixed}; {spies}"
        )


def calls(model: Any, spies: Spies) -> None:
    """Measure what a call costs beside its steps, and rows that end one by one, in two calls and in a session's."""
    engine = Engine(model, None)
    prompt = [5] * 32
    one = SamplingParams(max_new_tokens=1, ignore_eos=True)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        engine.generate([prompt], one)
        synchronize()
        times.append(f"{1e3 * (time.perf_counter() - began):.0f}")
    say(f"    one prompt, one token, three calls: {', '.join(times)} ms")
    written_profile(lambda: engine.generate([prompt], one), "cumtime", "call.prof.txt")
    rows = 8 if TINY else 256
    params = [SamplingParams(max_new_tokens=1 + index, ignore_eos=True) for index in range(rows)]
    with engine.session() as session:
        for label, each in (("call 1", engine), ("call 2", engine), ("session 1", session), ("session 2", session)):
            spies.clear()
            began = time.perf_counter()
            each.generate([prompt] * rows, params)
            synchronize()
            say(f"    {rows} rows that end one by one, {label}: {time.perf_counter() - began:.2f} s; {spies}")


def prefill(model: Any, label: str = "", **options: Any) -> None:
    """Measure prompts that are only prefilled; ``options`` are the engine's."""
    engine = Engine(model, None, policy="static", **options)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    for count, length in ((4, 40),) if TINY else ((64, 1024), (8, 8192)):
        prompts = torch.randint(3, 150 if TINY else 100_000, (count, length)).tolist()
        for _ in range(2):
            began = time.perf_counter()
            engine.generate(prompts, SamplingParams(max_new_tokens=1, ignore_eos=True))
            synchronize()
            seconds = time.perf_counter() - began
        rate = 2 * numbers * count * length / seconds
        say(f"    prefill {label}{count} x {length}: {count * length / seconds:.0f} tok/s, {rate / 1e12:.0f} TFLOP/s")


def main() -> None:
    """Measure in the order of value."""
    parser = argparse.ArgumentParser(description="Measures steps of a model.")
    parser.add_argument("shape")
    given = parser.parse_args()
    start(given.shape)
    model = random_model(given.shape)
    with watched() as spies:
        steps = Steps(model, spies)
        few, many = ROWS
        guarded(f"{few} rows, graphs", partial(steps.profiled, few, "graphs"))
        guarded(f"{few} rows, no graphs", partial(steps.eager, few))
        guarded(f"{many} rows, graphs", partial(steps.profiled, many, "graphs"))
        guarded("rows that come and go", partial(flow, model, spies))
        guarded("what a call costs", partial(calls, model, spies))
        guarded("prefill", partial(prefill, model))
        guarded(f"{many} rows, no graphs", partial(steps.eager, many))
        decode = partial(bench.Decoding, model, many, 64, STEPS)
        guarded("host profile of steps", partial(written_profile, decode, "tottime", "steps.prof.txt"))
    if CUDA:
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        say(f"  peak allocated {allocated / 1e9:.1f} GB, reserved {reserved / 1e9:.1f} GB")
    ended()


if __name__ == "__main__":
    main()
