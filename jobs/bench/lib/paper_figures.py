"""Compare settings and figures of arXiv 2503.05248 with simulated ones."""

from __future__ import annotations

import argparse
import math

import numpy as np

from jobs.bench.lib.tables import geomean, tell
from rollout.batcher.simulation.compare import Comparison, Spec, parse_spec, run
from rollout.batcher.simulation.simulator import Machine
from rollout.batcher.simulation.workloads import Workload, workload_of

# arXiv 2503.05248, Table I: model, mean prompt, mean output, requests, static and dynamic tok/s.
_TABLE_1 = (
    ("LLaMA-65B", 68.4, 344.5, 1319, 1983, 2146),
    ("LLaMA3-70B", 68.4, 454.4, 1319, 3153, 3357),
    ("LLaMA3-70B", 191.0, 381.9, 3000, 2296, 2575),
    ("PanGu-7B", 128, 128, 1000, 2305, 2956),
    ("PanGu-38B", 128, 128, 1000, 2215, 2569),
    ("PanGu-135B", 128, 128, 1000, 1342, 1449),
)
# Table II, with a budget of 50 ms: model, mean prompt, mean output, static and dynamic tok/s.
_TABLE_2 = (
    ("LLaMA-65B", 237.7, 416.2, 1190, 1223),
    ("LLaMA3-70B", 256.6, 61.5, 331, 405),
    ("LLaMA3-70B, PD fusion", 256.6, 447.5, 1322, 1665),
)
_FIGURE_3 = (30.0, 0.22, 0.0, 0.1)


def paper(given: argparse.Namespace) -> None:
    """Print the paper's figures beside simulated ones; the paper leaves out most of what they depend on."""
    print(
        "Assumed: step time of Fig. 3 (30 + 0.22 rows ms) for every model, 0.1 ms a prefilled token, static = 256 rows"
    )
    print("with no watermark, memory for N x 256 rows at their mean final length, lengths lognormal of CV 0.6")
    print("(constant where prompt and output are both 128).")
    specs = (Spec("static 256", "static", 256, 0.0), parse_spec("memory"), parse_spec("predictive"))
    heads = [f"{spec.text}, {share:g}" for share in (0.5, 1, 3) for spec in specs[1:]]
    lines = [["model", "prompt", "output", "paper: gain", *(f"{head}: gain" for head in heads)]]
    for model, prompt, output, requests, static, dynamic in _TABLE_1:
        cells = []
        for share in (0.5, 1, 3):
            machine = Machine(int(share * 256 * (prompt + output)), _FIGURE_3)
            rates = [
                geomean(run(spec, _of_means(model, prompt, output, requests, seed), machine, seed).tokens_per_s
                        for seed in range(given.seeds))
                for spec in specs
            ]  # fmt: skip
            cells += [f"{rate / rates[0] - 1:+.1%}" for rate in rates[1:]]
        lines.append([model, f"{prompt}", f"{output}", f"{dynamic / static - 1:+.1%}", *cells])
    print("\nTable I: tok/s over static 256, at 0.5, 1 and 3 times the memory that 256 rows need")
    tell(lines)
    print("\nTable II is of arrival rates, which a job with all rows at hand has not. Here: tok/s, a budget of 50 ms")
    print("and memory for 256 rows, relative to the best static batch that keeps it in at least 99 % of steps.")
    lines = [["model", "prompt", "output", "paper: tok/s", "paper: gain", "static", "sla", "over", "paper", "over",
              "predictive", "over"]]  # fmt: skip
    for model, prompt, output, static, dynamic in _TABLE_2:
        machine = Machine(int(256 * (prompt + output)), _FIGURE_3)
        trial = Comparison(_of_means(model, prompt, output, 3000, 0), machine, 0, 50.0)
        rate = trial.best_static.outcome.tokens_per_s
        cells = []
        for name in ("sla", "paper", "predictive"):
            outcome = trial.run(parse_spec(f"{name}:1024"))
            cells += [f"{outcome.tokens_per_s / rate - 1:+.1%}", f"{outcome.over(50.0):.1%}"]
        lines.append([model, f"{prompt}", f"{output}", f"{static} to {dynamic}", f"{dynamic / static - 1:+.1%}",
                      f"{rate:.0f}", *cells])  # fmt: skip
    tell(lines)


def _of_means(name: str, prompt: float, output: float, requests: int, seed: int) -> Workload:
    if prompt == output:
        return workload_of(name, np.full(requests, prompt), np.full(requests, output), 512)
    rng = np.random.default_rng([seed, 5])
    variance = math.log1p(0.36)
    noise = np.exp(math.sqrt(variance) * rng.standard_normal((2, requests)) - variance / 2)
    return workload_of(name, prompt * noise[0], output * noise[1], 4096)
