"""Times products with packed weights on a CPU beside oneDNN's, and beside a sum of the same bytes.

    python -m jobs.bench.products --dtype bfloat16 --rows 1,8,32,128,1024 --shapes 960x576,49152x576

Weights are as many copies as exceed the caches, and are multiplied one after the other, as a model's layers are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from jobs.bench.lib import tables
from rollout.models.patches import linear_products
from rollout.models.patches.compiled_products import compiled_products

#: Merged q/k/v, output, merged gate and up, down, head of SmolLM2-135M, then of Qwen2.5-0.5B.
SHAPES = (
    *("960x576", "576x576", "3072x576", "576x1536", "49152x576"),
    *("1152x896", "896x896", "9728x896", "896x4864", "151936x896"),
)
HEADER = ("outputs x inputs", "rows", "ours us", "oneDNN us", "oneDNN / ours", "sum / ours", "ours GFLOP/s")


def seconds(calls: list[Callable[[], object]], budget: float) -> list[float]:
    """Return the least seconds of each call, over interleaved rounds within a budget, three at least."""
    best, until, rounds = [float("inf")] * len(calls), time.perf_counter() + budget, 0
    while rounds < 3 or time.perf_counter() < until:
        for i, call in enumerate(calls):
            started = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - started)
        rounds += 1
    return best


def measured(shape: str, rows: list[int], dtype: torch.dtype, cold_bytes: float, budget: float) -> list[list[str]]:
    """Return a line of the table for each number of rows."""
    outputs, inputs = map(int, shape.split("x"))
    kernel = compiled_products()
    assert kernel is not None
    copies = max(1, round(cold_bytes / (outputs * inputs * dtype.itemsize)))
    weight = torch.randn(outputs, inputs).to(dtype)
    ours = [kernel.pack(weight, None) for _ in range(copies)]
    theirs = [linear_products._packed(weight, None) for _ in range(copies)]
    lines = []
    for count in rows:
        x = torch.randn(count, inputs).to(dtype)
        # Long products are timed one at a time.
        used = copies if count < 128 else max(1, min(copies, int(2e10 / (2 * count * outputs * inputs))))

        def own(used: int = used, x: torch.Tensor = x) -> None:
            for packed in ours[:used]:
                kernel.multiply(packed, x)

        def other(used: int = used, x: torch.Tensor = x) -> None:
            for multiply in theirs[:used]:
                multiply(x)

        def total(used: int = used) -> None:
            for packed in ours[:used]:
                packed.values.view(torch.float32).sum()

        times = [t / used for t in seconds([own, other, total], budget)]
        figures = (times[0] * 1e6, times[1] * 1e6)
        rate = 2 * count * outputs * inputs / times[0] / 1e9
        ratios = (times[1] / times[0], times[2] / times[0])
        lines.append([shape, str(count), *(f"{x:.1f}" for x in figures), *(f"{x:.2f}" for x in ratios), f"{rate:.0f}"])
    return lines


def main() -> None:
    """Print a line per shape and number of rows."""
    parser = argparse.ArgumentParser(description="Times products with packed weights on a CPU.")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rows", default="1,4,8,16,32,64,128,512,4096")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="OUTPUTSxINPUTS, with commas between")
    parser.add_argument("--cold-bytes", type=float, default=4e8, help="bytes of all copies of a weight")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds for each line")
    given = parser.parse_args()
    lines = []
    with torch.inference_mode():
        for shape in given.shapes.split(","):
            rows = [int(count) for count in given.rows.split(",")]
            lines += measured(shape, rows, getattr(torch, given.dtype), given.cold_bytes, given.budget)
    print(tables.render([HEADER, *lines]))


if __name__ == "__main__":
    main()
