"""Split the time of a step into layers, linears, attention, sampler and the rest, and compare it with a bound.

    python -m jobs.bench.cpu_step_profile MODEL --rows 8,48,128 --context 250
    python -m jobs.bench.cpu_step_profile MODEL --workload w1

The engine runs unchanged, with timers around the calls of those four; "layers" are decoder layers that run in one call,
products and attention included; "other" is the rest of the step: other modules,
pages, policy, Python. The bound is what the machine needs at least for the work of a step: for each matrix product and
each layer's attention the longer of reading its weights, or its keys and values, once and of its arithmetic. Memory is
read at the bandwidth of a sum over a large tensor by all threads; arithmetic runs at the rate of a large matrix
product, by the engine's kernel or torch's, whichever is faster here. CPU only.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
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
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.loading.load import resolve_path
from rollout.models.patches import linears
from rollout.models.patches.compiled_products import compiled_products
from rollout.models.patches.decoder_stack import DecoderStack
from rollout.models.patches.linear_products import LinearProduct
from rollout.requests import Request, StepReport

PARTS = ("layers", "linears", "attention", "sampler")
STEPS = 24
"""Decode steps that are measured for one number of rows."""
WARM_UP = 4
"""Decode steps before them: first calls allocate and compile."""
BANDWIDTH_BYTES = 1 << 29
LARGE = 2048
"""Rows, inputs and outputs of the product whose rate is measured."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one matrix product or one layer's attention must do at least."""

    read_bytes: int
    """Of its weights, or of the keys and values of its sequences, each of which has its own."""
    flops: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the engine, or the sum of several."""

    seconds: float
    parts: dict[str, float]
    products: Counter[Work]
    """Calls of linear layers."""
    attention: Counter[Work]
    """Layers that attended."""
    calls: int
    """Number of timed calls."""
    report: StepReport | None = None


def together(steps: Sequence[Step], seconds: float) -> Step:
    """Add up steps that took ``seconds`` in all."""
    parts, products, attention = Counter[str](), Counter[Work](), Counter[Work]()
    for step in steps:
        parts.update(step.parts)
        products.update(step.products)
        attention.update(step.attention)
    return Step(seconds, dict(parts), products, attention, sum(step.calls for step in steps))


def product_work(weight: torch.Tensor, rows: int) -> Work:
    """Return the work of a product with a weight [outputs, inputs]."""
    return Work(weight.numel() * weight.element_size(), 2 * weight.numel() * rows)


def attention_work(batch: ForwardBatch, layout: KVLayout, heads: Mapping[int, int]) -> Counter[Work]:
    """Return the work of attention in which each new token sees its whole sequence up to itself.

    Args:
        batch: sequences that attend.
        layout: of keys and values.
        heads: query heads of the layers, by index, that attend.
    """
    tokens = int(batch.seq_lens.sum())
    seen = int((batch.query_lens * batch.prefix_lens + batch.query_lens * (batch.query_lens + 1) // 2).sum())
    work = Counter[Work]()
    for index, queries in heads.items():
        layer = layout.layers[index]
        dims = layer.key_dim + layer.value_dim
        work[Work(tokens * layer.kv_heads * dims * layout.dtype.itemsize, 2 * seen * queries * dims)] += 1
    return work


class Timers:
    """Timers around the parts; `steps` has what each step of the engine took."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._weights: WeakKeyDictionary[LinearProduct, torch.Tensor] = WeakKeyDictionary()
        self.clear()

    def clear(self) -> None:
        """Forget what was timed since the last step."""
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._multiplied: list[tuple[torch.Tensor, int]] = []
        """Weights and rows of products."""
        self._attended: dict[PagedAttention, dict[int, int]] = {}
        """Query heads of the layers that attended."""
        self._stacks: list[tuple[Any, PagedAttention]] = []
        """Stacks that computed all their products and layers."""
        self._calls = 0

    def on_step(self, report: StepReport) -> None:
        """Record one step; the callback of `Engine.run`."""
        products, attention = self._work()
        self.steps.append(Step(report.step_ms / 1e3, self._parts, products, attention, self._calls, report))
        self.clear()

    def _work(self) -> tuple[Counter[Work], Counter[Work]]:
        """Return the products and the attention since the last step; counted here, for that takes time."""
        products = Counter(product_work(weight, rows) for weight, rows in self._multiplied)
        attention = Counter[Work]()
        for stack, step in self._stacks:
            rows = len(step.batch.tokens)
            products.update(product_work(self._weights[product], rows) for product in stack.products)
            heads = dict.fromkeys(range(len(step.layout.layers)), stack._stack.heads)
            attention.update(attention_work(step.batch, step.layout, heads))
        for step, heads in self._attended.items():
            attention.update(attention_work(step.batch, step.layout, heads))
        return products, attention

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
            self._multiplied.append((weight, x.numel() // x.shape[-1]))

        def linear(layer: nn.Linear, x: torch.Tensor) -> Any:
            count(layer.weight, x)
            return forward(layer, x)

        multiply = self.timed("linears", originals[1])

        def loading(product: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
            self._weights[product] = weight.detach().to("meta")  # its shape and dtype are wanted alone
            load(product, weight, bias)

        def product(product: Any, x: torch.Tensor) -> Any:
            count(self._weights[product], x)
            return multiply(product, x)

        layers = self.timed("layers", run_layers)

        def running(stack: Any, attention: PagedAttention, hidden: torch.Tensor, *angles: torch.Tensor) -> Any:
            self._stacks.append((stack, attention))
            return layers(stack, attention, hidden, *angles)

        def attending(step: PagedAttention, module: nn.Module, query: torch.Tensor, *a: Any) -> Any:
            heads = self._attended.setdefault(step, {})
            heads[len(heads)] = query.shape[1]
            return attend(step, module, query, *a)

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


@dataclass(frozen=True, slots=True)
class Machine:
    """The best that this machine does, per second."""

    bandwidth: float
    """Bytes read."""
    rate: float
    """Floating-point operations of a matrix product."""

    @classmethod
    def measured(cls, dtype: torch.dtype) -> Machine:
        """Measure this machine, on products in ``dtype`` and in float32, which may be faster."""
        bandwidth = BANDWIDTH_BYTES / _best_of(5, torch.sum, torch.ones(BANDWIDTH_BYTES // 4))
        return cls(bandwidth, max(_rate(one) for one in {dtype, torch.float32}))

    def bound(self, work: Counter[Work]) -> float:
        """Return the seconds that some work takes at least."""
        return sum(calls * max(one.read_bytes / self.bandwidth, one.flops / self.rate) for one, calls in work.items())


def _rate(dtype: torch.dtype) -> float:
    """Return the rate of a large product by the faster of the kernels that there are."""
    x, weight = (torch.randn(LARGE, LARGE).to(dtype) for _ in range(2))
    products = [lambda x: F.linear(x, weight)]
    kernel = compiled_products()
    if kernel is not None:
        packed = kernel.pack(weight, None)
        products.append(lambda x: kernel.multiply(packed, x))
    return 2 * LARGE**3 / min(_best_of(5, product, x) for product in products)


def _best_of(times: int, call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> float:
    """Return the seconds of the fastest of some calls."""
    best = float("inf")
    with torch.no_grad():
        for _ in range(times):
            started = time.perf_counter()
            call(x)
            best = min(best, time.perf_counter() - started)
    return best


HEADER = ("rows", "step ms", *(f"{part} %" for part in (*PARTS, "other")), "products ms", "KV ms", "step / bound")


def line(name: str, step: Step, count: int, machine: Machine) -> tuple[str, ...]:
    """Return a row under `HEADER`: the mean over ``count`` steps."""
    other = step.seconds - sum(step.parts.values())
    shares = [100 * seconds / step.seconds for seconds in (*(step.parts[part] for part in PARTS), other)]
    products, attention = machine.bound(step.products), machine.bound(step.attention)
    whole, *bounds = (f"{1e3 * seconds / count:.2f}" for seconds in (step.seconds, products, attention))
    return (name, whole, *(f"{share:.1f}" for share in shares), *bounds, f"{step.seconds / (products + attention):.2f}")


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
    machine = Machine.measured(next(model.parameters()).dtype)
    lines, calls = [], []
    if requests:
        whole, count = whole_run(model, requests, Timers())
        lines.append(line(Path(given.workload).stem, whole, count, machine))
        calls.append(whole.calls / count)
    for rows in [] if requests else [int(text) for text in given.rows.split(",")]:
        steps = decode_steps(model, rows, given.context, Timers())
        # The faster half: another process's turn on a core would weigh on the mean of all.
        steps = sorted(steps, key=lambda step: step.seconds)[: len(steps) // 2 + 1]
        whole = together(steps, sum(step.seconds for step in steps))
        lines.append(line(str(rows), whole, len(steps), machine))
        calls.append(whole.calls / len(steps))
    print(tables.render([HEADER, *lines]))
    print(
        f"\nproducts and KV are the bound; memory is read at {machine.bandwidth / 1e9:.1f} GB/s, "
        f"products run at {machine.rate / 1e9:.0f} GFLOP/s; "
        f"timers take {1e3 * overhead() * max(calls):.2f} ms a step; {torch.get_num_threads()} threads"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
