"""Generate one workload with this engine, ``generate_batch`` and static ``generate``: tokens a second, steps by kind.

    python -m jobs.gpu.peers qwen2.5-1.5b [--requests 512] [--max-new 256] [--engines ours,continuous:own,static:64]

``continuous:own`` is ``generate_batch`` as it comes, ``continuous`` with CUDA graphs and asynchronous batches always.
``static`` runs the first batch of the workload alone: others of the same size take as long.
"""

from __future__ import annotations

import argparse
import random
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from jobs.bench.engines.transformers_continuous import Continuous
from jobs.bench.lib import workload
from jobs.bench.lib.spies import Spies, watched
from jobs.gpu.common import CUDA, DEVICE, TINY, ended, free_memory, guarded, random_model, say, start, synchronize
from rollout import Engine, SamplingParams
from rollout.requests import Request, StepReport

ALL_ROWS = 1024
STATIC_ROWS = 256
LONG_TURN = 12.0
"""Seconds of a turn of a peer after which there is no second one."""


class Comparison:
    """One model and one workload.

    Args:
        model: on the device.
        spies: watch this engine.
    """

    def __init__(self, model: Any, requests: list[workload.Request], spies: Spies) -> None:
        self._model, self._requests, self._spies = model, requests, spies
        self.tokens = sum(request.n for request in requests)

    def run(self, name: str) -> None:
        """Generate with an engine, ``NAME[:ROWS]``."""
        kind, _, setting = name.partition(":")
        free_memory()
        if kind == "ours":
            self._ours(name, int(setting or ALL_ROWS))
        elif kind == "continuous":
            self._continuous(name, graphs=None if setting == "own" else True)
        else:
            self._static(name, int(setting or STATIC_ROWS))

    def _report(self, name: str, tokens: int, seconds: float) -> None:
        peak = f", peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if CUDA else ""
        say(f"  {name:22s} {tokens / seconds:8.0f} tok/s ({seconds:.2f} s{peak})")

    def _ours(self, name: str, cap: int) -> None:
        """With a cap rows join all the time, so most steps have a prefill."""
        engine = Engine(self._model, None, max_rows=cap)
        for turn in range(2 if cap == ALL_ROWS else 1):
            steps: list[tuple[bool, float, int]] = []

            def on_step(report: StepReport, steps: list[tuple[bool, float, int]] = steps) -> None:
                steps.append((report.prefill_tokens > 0, report.step_ms, report.live_rows))

            requests = [
                Request(str(index), list(one.ids), SamplingParams(max_new_tokens=one.n, ignore_eos=True), 0)
                for index, one in enumerate(self._requests)
            ]
            self._spies.clear()
            began = time.perf_counter()
            tokens = sum(len(record.completion_ids) for record in engine.run(requests, on_step=on_step))
            synchronize()
            seconds = time.perf_counter() - began
            assert tokens == self.tokens, (tokens, self.tokens)
            self._report(f"{name}, turn {turn + 1}", tokens, seconds)
            for prefills, label in ((False, "decode only"), (True, "with prefill")):
                found = np.array([(ms, rows) for kind, ms, rows in steps if kind == prefills] or [(0, 0)])
                say(
                    f"    {label:12s}: {sum(kind == prefills for kind, *_ in steps)} steps,"
                    f" {found[:, 0].sum() / 1e3:.2f} s, median {np.median(found[:, 0]):.2f} ms,"
                    f" p95 {np.quantile(found[:, 0], 0.95):.2f} ms, rows {found[:, 1].mean():.0f}"
                )
            if CUDA:
                say(f"    {self._spies}")

    def _continuous(self, name: str, graphs: bool | None) -> None:
        run = Continuous(self._model, DEVICE, graphs=graphs, do_sample=True, top_k=0)
        for turn in range(2):
            began = time.perf_counter()
            done = run(self._requests)
            synchronize()
            seconds = time.perf_counter() - began
            tokens = sum(map(len, done))
            assert tokens >= 0.99 * self.tokens, (tokens, self.tokens)
            self._report(f"{name}, turn {turn + 1}", tokens, seconds)
            if seconds > LONG_TURN:
                break

    def _static(self, name: str, rows: int) -> None:
        self._model.set_attn_implementation("sdpa")
        batch = self._requests[:rows]
        width, new = max(len(one.ids) for one in batch), max(one.n for one in batch)
        pads = [width - len(one.ids) for one in batch]
        ids = [[0] * pad + list(one.ids) for pad, one in zip(pads, batch, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        began = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                input_ids=torch.tensor(ids, device=DEVICE),
                attention_mask=torch.tensor(mask, device=DEVICE),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
            )
        synchronize()
        self._report(f"{name}, {len(batch)} rows", sum(one.n for one in batch), time.perf_counter() - began)


def main() -> None:
    """Run each engine in turn on the same requests."""
    parser = argparse.ArgumentParser(description="Generates one workload with several engines.")
    parser.add_argument("shape")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--max-new", type=int, default=256)
    parser.add_argument("--engines", default="ours,ours:128,continuous:own,static,continuous")
    given = parser.parse_args()
    draws = random.Random(7)
    lengths = [9 if TINY else draws.randint(40, 160) for _ in range(given.requests)]
    prompts = [[draws.randrange(3, 190 if TINY else 120_000) for _ in range(length)] for length in lengths]
    requests = workload.build(prompts, workload.Shape(requests=given.requests, max_new=given.max_new))
    with watched() as spies:
        comparison = Comparison(random_model(given.shape), requests, spies)
        longest = max(request.n for request in requests)
        start(f"{given.shape}, {given.requests} requests, {comparison.tokens} tokens, longest {longest}")
        for name in given.engines.split(","):
            guarded(name, partial(comparison.run, name))
    ended()


if __name__ == "__main__":
    main()
