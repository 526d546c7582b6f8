"""Split the time of a step into layers, linears, attention, sampler and the rest, and compare it with a bound.

    python -m jobs.bench.cpu_step_profile MODEL --rows 8,48,128 --context 250
    python -m jobs.bench.cpu_step_profile MODEL --workload w1

The engine runs unchanged, with timers around the calls of those four; "layers" are decoder layers that run in one call,
products and attention included; "other" is the rest of the step: other modules,
pages, policy, Python. The bound is the least work of a step: its matrix products, at the best rate that torch reaches
here for each shape and number of rows, plus one read of all keys and values, at the bandwidth of a sum over a large
tensor. CPU only.
"""

from __future__ import annotations

import argparse
import sys
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

import rollout.engine.loop
from jobs.bench.engines.harness import Setup
from jobs.bench.engines.loading import load
from jobs.bench.lib import tables, workload
from rollout import Engine, SamplingParams
from rollout.models.attention.base import PagedAttention
from rollout.models.loading.load import resolve_path
from rollout.models.patches import linears
from rollout.models.patches.decoder_stack import DecoderStack
from rollout.models.patches.linear_products import LinearProduct
from rollout.requests import Request, StepReport

PARTS = ("layers", "linears", "attention", "sampler")
STEPS = 24
"""Decode steps that are measured for one number of rows."""
WARM_UP = 4
"""Decode steps before them: first calls allocate and compile."""
BANDWIDTH_BYTES = 1 << 29

Shape = tuple[int, int]
"""Outputs and inputs of a linear layer."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the engine, or the sum of several."""

    seconds: float
    parts: dict[str, float]
    products: Counter[tuple[Shape, int]]
    """Calls of linear layers of a shape with a number of rows."""
    token_bytes: int
    """KV bytes of one token."""
    calls: int
    """Number of timed calls."""
    report: StepReport | None = None

    @property
    def flops(self) -> int:
        return sum(2 * out * into * rows * calls for ((out, into), rows), calls in self.products.items())


def together(steps: Sequence[Step], seconds: float) -> Step:
    """Add up steps that took ``seconds`` in all."""
    parts, products = Counter[str](), Counter[tuple[Shape, int]]()
    for step in steps:
        parts.update(step.parts)
        products.update(step.products)
    return Step(seconds, dict(parts), products, steps[-1].token_bytes, sum(step.calls for step in steps))


class Timers:
    """Timers around the parts; `steps` has what each step of the engine took."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.weights: dict[Shape, list[torch.Tensor]] = defaultdict(list)
        """Weights of packed products; one may combine several layers."""
        self.clear()

    def clear(self) -> None:
        """Forget what was timed since the last step."""
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._products = Counter[tuple[Shape, int]]()
        self._token_bytes = self._calls = 0

    def on_step(self, report: StepReport) -> None:
        """Record one step; the callback of `Engine.run`."""
        step = Step(report.step_ms / 1e3, self._parts, self._products, self._token_bytes, self._calls, report)
        self.steps.append(step)
        self.clear()

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``call`` so that its time is added to a part."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = call(*args, **kwargs)
            self._parts[part] += time.perf_counter() - started
            self._calls += 1
            return result

        return wrapper

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Install the timers inside this block."""
        loop: Any = rollout.engine.loop
        copies: Any = LinearProduct
        stacks: Any = DecoderStack
        originals = nn.Linear.forward, copies.__call__, PagedAttention.attend_tokens, loop.sample
        run_layers = stacks.run
        load = copies.load
        forward, attend = self.timed("linears", originals[0]), self.timed("attention", originals[2])

        def count(weight: torch.Tensor, x: torch.Tensor) -> None:
            self._products[(weight.shape[0], weight.shape[1]), x.numel() // x.shape[-1]] += 1

        def linear(layer: nn.Linear, x: torch.Tensor) -> Any:
            count(layer.weight, x)
            return forward(layer, x)

        multiply = self.timed("linears", originals[1])
        of: WeakKeyDictionary[Any, torch.Tensor] = WeakKeyDictionary()

        def loading(product: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
            self.weights[weight.shape[0], weight.shape[1]].append(weight)
            of[product] = weight
            load(product, weight, bias)

        def product(product: Any, x: torch.Tensor) -> Any:
            count(of[product], x)
            return multiply(product, x)

        layers = self.timed("layers", run_layers)

        def running(stack: Any, attention: PagedAttention, hidden: torch.Tensor, *angles: torch.Tensor) -> Any:
            for multiplied in stack.products:
                count(of[multiplied], hidden)
            stored = attention.layout.layers
            dims = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in stored)
            self._token_bytes += dims * attention.layout.dtype.itemsize
            return layers(stack, attention, hidden, *angles)

        def attending(
            step: PagedAttention,
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            *a: Any,
        ) -> Any:
            self._token_bytes += sum(x.shape[1] * x.shape[2] * step.layout.dtype.itemsize for x in (key, value))
            return attend(step, module, query, key, value, *a)

        nn.Linear.forward, copies.__call__, copies.load = linear, product, loading  # type: ignore[method-assign, assignment]
        # Layers whose class has another forward are not packed; this one only adds a timer.
        linears._FORWARD = linear  # type: ignore[assignment]
        PagedAttention.attend_tokens = attending  # type: ignore[method-assign, assignment]
        loop.sample = self.timed("sampler", originals[3])
        stacks.run = running
        try:
            yield
        finally:
            nn.Linear.forward, copies.__call__, PagedAttention.attend_tokens, loop.sample = originals  # type: ignore[method-assign]
            copies.load = load
            stacks.run = run_layers
            linears._FORWARD = originals[0]


def overhead() -> float:
    """Return the overhead of one timer, in seconds."""
    calls, timed = 20_000, Timers().timed(PARTS[0], lambda: None)
    started = time.perf_counter()
    for _ in range(calls):
        timed()
    return (time.perf_counter() - started) / calls


def decode_steps(model: Any, rows: int, context: int, timers: Timers) -> list[Step]:
    """Return steps that only decode ``rows`` rows of about ``context`` tokens each."""
    new, vocabulary = WARM_UP + STEPS + 1, model.get_input_embeddings().weight.shape[0]
    draws = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (rows, max(1, context - new // 2)), generator=draws).tolist()
    params = SamplingParams(max_new_tokens=new, ignore_eos=True)
    with timers.installed():
        engine = Engine(model, None, policy="static", max_rows=rows)  # packs the layers
        timers.clear()
        for _ in engine.run([Request(str(i), ids, params) for i, ids in enumerate(prompts)], on_step=timers.on_step):
            pass
    alone = [step for step in timers.steps if step.report and not step.report.prefill_tokens]
    return [step for step in alone if step.report and step.report.live_rows == rows][WARM_UP:]


def whole_run(model: Any, requests: Sequence[workload.Request], timers: Timers) -> tuple[Step, int]:
    """Return the sum of all steps of a workload and their number; the time between steps is included."""
    asked = [
        Request(str(i), request.ids, SamplingParams(max_new_tokens=request.n, ignore_eos=True))
        for i, request in enumerate(requests)
    ]
    with timers.installed():
        engine = Engine(model, None)  # packs the layers
        timers.clear()
        started = time.perf_counter()
        for _ in engine.run(asked, on_step=timers.on_step):
            pass
    return together(timers.steps, time.perf_counter() - started), len(timers.steps)


def tokens_read(requests: Sequence[workload.Request]) -> int:
    """Count the keys that decoding reads: each token reads its whole sequence; the first comes with the prompt."""
    return sum((request.n - 1) * len(request.ids) + request.n * (request.n - 1) // 2 for request in requests)


class Bound:
    """The best that the CPU can do, measured on the run's own weights, which exceed its caches as well.

    Args:
        model: whose layers multiply.
        copied: weights of products that stand for several layers, or for copies.
    """

    def __init__(self, model: nn.Module, copied: Mapping[Shape, Sequence[torch.Tensor]]) -> None:
        own: dict[Shape, list[torch.Tensor]] = defaultdict(list)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                own[layer.out_features, layer.in_features].append(layer.weight.detach())
        self._weights: dict[Shape, Sequence[torch.Tensor]] = {**own, **copied}
        self._dtype = _fastest_dtype(max((own[0] for own in self._weights.values()), key=torch.numel))
        self.bandwidth = _bandwidth()

    def products(self, wanted: Counter[tuple[Shape, int]]) -> float:
        """Return the seconds of all these products."""
        by_shape: dict[Shape, Counter[int]] = defaultdict(Counter)
        for (shape, rows), calls in wanted.items():
            by_shape[shape][rows] += calls
        total = 0.0
        for shape, calls_by_rows in by_shape.items():
            # A run has steps of any size: between powers of two the time is nearly linear.
            points = sorted(calls_by_rows) if len(calls_by_rows) <= 4 else _powers(max(calls_by_rows))
            seconds = self._measure(shape, points)
            total += sum(calls * _between(points, seconds, rows) for rows, calls in calls_by_rows.items())
        return total

    def _measure(self, shape: Shape, points: Sequence[int]) -> list[float]:
        """Return the seconds of one product of a shape per number of rows: the best of `_FORMS`."""
        best = [float("inf")] * len(points)
        for form in _FORMS:
            try:
                layers = [form(weight.to(self._dtype)) for weight in self._weights[shape]]
            except (RuntimeError, AttributeError):  # this build of torch does not have it
                continue
            for i, rows in enumerate(points):
                x = torch.randn(rows, shape[1], dtype=self._dtype)
                best[i] = min(best[i], _best_of(3, layers, x) / len(layers))
        return best


def _plain(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: F.linear(x, weight)


def _packed(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Use a weight packed by oneDNN, through private operators of torch."""
    mkldnn: Any = torch.ops.mkldnn
    laid_out = mkldnn._reorder_linear_weight(weight.contiguous(), 128)
    return lambda x: mkldnn._linear_pointwise(x, laid_out, None, "none", [], "")


_FORMS = (_plain, _packed)


def _fastest_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype in which products of a few dozen rows are fastest: float32 may beat bfloat16."""

    def seconds(dtype: torch.dtype) -> float:
        return _best_of(2, [_plain(weight.to(dtype))], torch.randn(32, weight.shape[1], dtype=dtype))

    return min((torch.float32, weight.dtype), key=seconds)


def _bandwidth() -> float:
    """Measure the read bandwidth in bytes per second."""
    return BANDWIDTH_BYTES / _best_of(5, [torch.sum], torch.ones(BANDWIDTH_BYTES // 4))


def _best_of(times: int, calls: Sequence[Callable[[torch.Tensor], Any]], x: torch.Tensor) -> float:
    """Return the seconds of all ``calls``, one after the other: the best of some rounds."""
    best = float("inf")
    with torch.no_grad():
        for _ in range(times):
            started = time.perf_counter()
            for call in calls:
                call(x)
            best = min(best, time.perf_counter() - started)
    return best


def _powers(most: int) -> list[int]:
    """Return the powers of two up to the first that is at least ``most``."""
    return [1 << i for i in range((most - 1).bit_length() + 1)]


def _between(points: Sequence[int], values: Sequence[float], at: int) -> float:
    """Interpolate linearly at ``at``, which lies between the first and last point."""
    right = bisect_left(points, at)
    if points[right] == at:
        return values[right]
    share = (at - points[right - 1]) / (points[right] - points[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])


HEADER = (
    "rows",
    "step ms",
    *(f"{part} %" for part in (*PARTS, "other")),
    "GEMM ms",
    "KV ms",
    "step / bound",
    "GFLOP/s",
)


def line(name: str, step: Step, count: int, products: float, reads: float) -> tuple[str, ...]:
    """Return a row under `HEADER`: the mean over ``count`` steps."""
    other = step.seconds - sum(step.parts.values())
    shares = [100 * seconds / step.seconds for seconds in (*(step.parts[part] for part in PARTS), other)]
    figures = (step.seconds, products, reads)
    whole, gemm, kv = (f"{1e3 * seconds / count:.1f}" for seconds in figures)
    ratio = f"{step.seconds / (products + reads):.2f}"
    return (name, whole, *(f"{share:.1f}" for share in shares), gemm, kv, ratio, f"{step.flops / products / 1e9:.0f}")


def main() -> int:
    """Print a line per number of rows, or one for a workload."""
    parser = argparse.ArgumentParser(description="Shows where the engine's steps go, on a CPU.")
    parser.add_argument("model", help="model folder, Hub id, or packaged:NAME")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rows", default="8,48,128", help="numbers of rows, with commas between")
    parser.add_argument("--context", type=int, default=250, help="tokens of a row")
    parser.add_argument("--workload", help=f"a whole run instead: {', '.join(workload.NAMED)}, or a workload file")
    given = parser.parse_args()
    try:
        folder = resolve_path(given.model)
        shape = workload.NAMED.get(given.workload or "")
        requests = (
            workload.make(folder, shape) if shape else workload.read(Path(given.workload)) if given.workload else []
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    model: Any = load(Setup(folder, given.dtype, "cpu"))
    lines, calls, timers = [], [], Timers()
    if requests:
        run, count = whole_run(model, requests, timers)
        bound = Bound(model, timers.weights)
        reads = tokens_read(requests) * (run.token_bytes or 0) / bound.bandwidth
        lines.append(line(Path(given.workload).stem, run, count, bound.products(run.products), reads))
        calls.append(run.calls / count)
    for rows in [] if requests else [int(text) for text in given.rows.split(",")]:
        timers = Timers()
        steps = decode_steps(model, rows, given.context, timers)
        bound = Bound(model, timers.weights)
        # The faster half: another process's turn on a core would weigh on the mean of all.
        steps = sorted(steps, key=lambda step: step.seconds)[: len(steps) // 2 + 1]
        whole = together(steps, sum(step.seconds for step in steps))
        reads = len(steps) * rows * given.context * whole.token_bytes / bound.bandwidth
        lines.append(line(str(rows), whole, len(steps), bound.products(whole.products), reads))
        calls.append(whole.calls / len(steps))
    print(tables.render([HEADER, *lines]))
    print(
        f"\nGEMM and KV are the bound; memory is read at {bound.bandwidth / 1e9:.1f} GB/s; "
        f"timers take {1e3 * overhead() * max(calls):.2f} ms a step; {torch.get_num_threads()} threads"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
