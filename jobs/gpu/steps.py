"""Measure decode steps of a model: share of the bandwidth bound, graphs on and off, kernels and gaps, host, captures.

python -m jobs.gpu.steps qwen2.5-1.5b [--rows 64,256] [--context 1024] [--extras]
"""

from __future__ import annotations

import argparse
import cProfile
import functools
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

import rollout.engine.engine
from jobs.bench import decode_bandwidth as bench
from jobs.gpu.common import CUDA, DEVICE, OUT, TINY, ended, guarded, random_model, say, synchronize
from rollout import Engine, SamplingParams
from rollout.engine.pending_tokens import PendingTokens
from rollout.models.runners import cuda_graphs
from rollout.models.runners.select import select_strategy

KERNELS_NAMED = 14


class Spies:
    """Time what a step waits for on the host, and every capture of a graph."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.captures: list[tuple[int, float]] = []
        draw: Any = PendingTokens
        runner: Any = cuda_graphs.CudaGraphRunner
        read, capture = draw.read, runner._capture

        def waited(pending: Any) -> Any:
            began = time.perf_counter()
            if pending._copied is not None:
                pending._copied.synchronize()
            self.waits.append(time.perf_counter() - began)
            return read(pending)

        def counted(graphs: Any, size: int, *rest: Any) -> Any:
            began = time.perf_counter()
            done = capture(graphs, size, *rest)
            synchronize()
            self.captures.append((size, time.perf_counter() - began))
            return done

        draw.read, runner._capture = waited, counted

    def clear(self) -> None:
        """Forget what was timed."""
        self.waits.clear()
        self.captures.clear()


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
    """Decode steps of one model."""

    def __init__(self, model: Any, context: int, steps: int, spies: Spies) -> None:
        self._model, self._context, self._steps, self._spies = model, context, steps, spies
        self._bandwidth = bench.copy_bandwidth(DEVICE)
        self._layout = select_strategy(model).kv_layout()
        weights = bench.weight_bytes(model)
        say(f"# copies at {self._bandwidth / 1e9:.0f} GB/s; weights {weights / 1e9:.2f} GB")

    def measure(self, rows: int, label: str) -> float:
        """Report the steps of so many rows; return the median seconds."""
        self._spies.clear()
        began = time.perf_counter()
        run = bench.Decoding(self._model, rows, self._context, self._steps)
        durations = [after - before for before, after in pairwise(run.times)]
        # On average half of the last page of each row is empty.
        tokens = sum(run.tokens) / len(run.tokens) - rows * (self._layout.page_size - 1) / 2
        bound = (bench.weight_bytes(self._model) + tokens * self._layout.bytes_per_token) / self._bandwidth
        seconds = median(durations)
        host = seconds - median(self._spies.waits[-self._steps - 3 : -3] or [0.0])
        captured = [(size, round(1e3 * spent)) for size, spent in self._spies.captures]
        say(
            f"  {label:7s} rows {rows:4d} context {tokens / rows:.0f}: step {1e3 * seconds:.3f} ms"
            f" (min {1e3 * min(durations):.3f}, max {1e3 * max(durations):.3f});"
            f" bound {1e3 * bound:.3f} = {100 * bound / seconds:.1f} %; host {1e3 * host:.2f} ms;"
            f" {rows / seconds:.0f} tok/s; first step {run.first_seconds:.2f} s; captured {captured} ms;"
            f" all {time.perf_counter() - began:.1f} s"
        )
        return seconds

    def graphs(self, rows: int) -> None:
        """Measure with graphs, and profile what kernels run in a step."""
        seconds = self.measure(rows, "graphs")
        if CUDA:
            found = bench.profile(self._model, rows, self._context)
            gap = 100 * max(0.0, 1 - found.busy / seconds)
            say(f"    kernels {1e3 * found.busy:.3f} ms of {1e3 * seconds:.3f}: gaps {gap:.0f} %")
            for name, spent in found.kernels[:KERNELS_NAMED]:
                say(f"      {1e3 * spent:7.3f} ms  {name[:110]}")

    def eager(self, rows: int) -> None:
        """Measure without graphs."""
        with without_graphs():
            self.measure(rows, "eager")


def profiled(call: Callable[[], object], order: str, name: str) -> None:
    """Write where the host spends the time of a call."""
    profile = cProfile.Profile()
    profile.runcall(call)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats(order).print_stats(45)
    (OUT / name).write_text(text.getvalue(), encoding="utf-8")


def calls(model: Any, spies: Spies) -> None:
    """Measure what a call costs beside its steps, and rows that end one by one, each on another graph."""
    engine = Engine(model, None)
    prompt = [5] * 32
    one = SamplingParams(max_new_tokens=1, ignore_eos=True)
    for _ in range(3):
        began = time.perf_counter()
        engine.generate([prompt], one)
        synchronize()
        say(f"    one prompt, one token: {1e3 * (time.perf_counter() - began):.0f} ms")
    profiled(lambda: engine.generate([prompt], one), "cumtime", "call.prof.txt")
    spies.clear()
    rows = 8 if TINY else 256
    params = [SamplingParams(max_new_tokens=1 + index, ignore_eos=True) for index in range(rows)]
    began = time.perf_counter()
    engine.generate([prompt] * rows, params)
    synchronize()
    spent = sum(seconds for _, seconds in spies.captures)
    say(
        f"    {rows} rows that end one by one: {time.perf_counter() - began:.2f} s,"
        f" of it {len(spies.captures)} captures {spent:.2f} s"
    )


def prefill(model: Any) -> None:
    """Measure prompts that are only prefilled."""
    engine = Engine(model, None, policy="static")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    for count, length in ((4, 40),) if TINY else ((64, 1024), (8, 8192)):
        prompts = torch.randint(3, 150 if TINY else 100_000, (count, length)).tolist()
        for _ in range(2):
            began = time.perf_counter()
            engine.generate(prompts, SamplingParams(max_new_tokens=1, ignore_eos=True))
            synchronize()
            seconds = time.perf_counter() - began
        rate = 2 * numbers * count * length / seconds
        say(f"    {count} x {length}: {count * length / seconds:.0f} tokens/s, {rate / 1e12:.0f} TFLOP/s")


def main() -> None:
    """Measure each number of rows, and with ``--extras`` calls, prefills and the host."""
    parser = argparse.ArgumentParser(description="Measures decode steps of a model.")
    parser.add_argument("shape")
    parser.add_argument("--rows", default="64,256")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--no-eager", action="store_true")
    parser.add_argument("--extras", action="store_true")
    given = parser.parse_args()
    # With 2,048 tokens per step the prefill would take 124 steps, and the first rows would end before the last joined.
    engines: Any = rollout.engine.engine
    engines.Bounds = functools.partial(engines.Bounds, prefill_tokens=1 << 17)
    began = time.perf_counter()
    model = random_model(given.shape)
    synchronize()
    say(f"# steps {given.shape}: loaded in {time.perf_counter() - began:.1f} s")
    spies = Spies()
    steps = Steps(model, given.context, given.steps, spies)
    sizes = [int(text) for text in given.rows.split(",")]
    for rows in sizes:
        guarded(f"{rows} rows, graphs", partial(steps.graphs, rows))
        if CUDA and not given.no_eager:
            guarded(f"{rows} rows, no graphs", partial(steps.eager, rows))
    if given.extras:
        guarded("what a call costs", partial(calls, model, spies))
        guarded("prefill", partial(prefill, model))
        decode = partial(bench.Decoding, model, sizes[-1], 64, 64)
        guarded("host profile of steps", partial(profiled, decode, "tottime", "steps.prof.txt"))
    if CUDA:
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        say(f"  peak allocated {allocated / 1e9:.1f} GB, reserved {reserved / 1e9:.1f} GB")
    ended()


if __name__ == "__main__":
    main()
