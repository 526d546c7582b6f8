"""What the parts of the first run share: the device, lines that are printed and kept, guarded checks, times."""

from __future__ import annotations

import gc
import logging
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jobs.bench.lib.random_models import SHAPES

DEVICE = torch.device(os.environ.get("FIRST_RUN_DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"
TINY = bool(os.environ.get("FIRST_RUN_TINY"))
"""Whether everything is so small that a CPU can try it; figures mean nothing then."""
OUT = Path(os.environ.get("OUT", "first_run_out"))
PART = os.environ.get("FIRST_RUN_PART") or Path(sys.argv[0]).stem
BEGAN = time.perf_counter()
_FLUSH_BYTES = 96 << 20
"""More than a GPU's L2 cache holds."""


def say(*words: object) -> None:
    """Print a line, and append it to the part's file."""
    line = " ".join(map(str, words))
    print(line, flush=True)
    with (OUT / f"{PART}.txt").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def start(*words: object) -> None:
    """Begin the part's file with a line, and report warnings of the product from now on."""
    OUT.mkdir(parents=True, exist_ok=True)
    logging.getLogger("rollout").addHandler(Warnings())
    say(f"# {PART}:", *words)


def ended() -> None:
    """Report how long the part took."""
    say(f"# {PART} took {time.perf_counter() - BEGAN:.0f} s")


def synchronize() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


class Warnings(logging.Handler):
    """Report every warning of the product once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen = set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._seen:
            self._seen.add(text)
            say("  WARN", text[:300])


def guarded(name: str, check: Callable[[], object]) -> None:
    """Run a check; an exception becomes a line of the report, and the part goes on."""
    began = time.perf_counter()
    try:
        check()
    except Exception as error:  # noqa: BLE001 - whatever fails, the other checks are worth their time
        with (OUT / f"{PART}.trace").open("a", encoding="utf-8") as file:
            file.write(f"--- {name}\n{traceback.format_exc()}\n")
        lines = str(error).strip().splitlines() or [""]
        say(f"  FAIL {name}: {type(error).__name__}: {lines[0][:220]}")
    else:
        say(f"  done {name} in {time.perf_counter() - began:.1f} s")


def timed(call: Callable[[], object], repeat: int = 20, warm: int = 3) -> float:
    """Measure the median seconds of a call on the device, with nothing in its L2 cache before."""
    for _ in range(warm):
        call()
    if not CUDA:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    pairs: list[tuple[Any, Any]] = []
    for _ in range(repeat):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in pairs)) / 1e3


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """Capture a call in a graph, so that launching it does not count; on a CPU return it as it is."""
    if not CUDA:
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def random_model(shape: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Draw a model in one of the benchmark's shapes, on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, fields = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=dtype)
    return model.eval()
