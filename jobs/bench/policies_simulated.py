"""What batching policies are worth, by simulation: the figures of docs/results, one command each.

python -m jobs.bench.policies_simulated memory --machines A,B,C,S,E --seeds 3
python -m jobs.bench.policies_simulated budget
python -m jobs.bench.policies_simulated hints --workloads ln1.5,ln0.6,geom,grpo --seeds 4
python -m jobs.bench.policies_simulated useless --machines S --workloads ln1.5,ln0.6,geom,grpo --seeds 100
python -m jobs.bench.policies_simulated forecast
python -m jobs.bench.policies_simulated paper
python -m jobs.bench.policies_simulated cost
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import numpy as np

from jobs.bench.lib.decision_cost import cost
from jobs.bench.lib.hidden_limits import AHEAD, Unaware, quantiles
from jobs.bench.lib.paper_figures import paper
from jobs.bench.lib.tables import geomean, tell
from rollout.batcher.admission_order import by_latest_start, steady_rows
from rollout.batcher.preemption import Victim, cheapest, youngest
from rollout.batcher.registry import make_policy
from rollout.batcher.simulation.compare import MAX_ROWS, Comparison, Spec, budget_score, parse_spec, run
from rollout.batcher.simulation.lower_bound import lower_bound_s
from rollout.batcher.simulation.simulator import Machine, Outcome, simulate
from rollout.batcher.simulation.workloads import WORKLOADS, Workload, named_workload, with_hints
from rollout.batcher.types import Bounds, FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Setting:
    """A machine, and the number of rows of its jobs."""

    machine: Machine
    requests: int

    def workload(self, name: str, seed: int) -> Workload:
        """Generate a workload; the one with the longest rows has half as many."""
        return named_workload(name, self.requests // (2 if name == "bimod" else 1), seed)


_H100 = (5.5, 0.02, 4.4e-5, 0.02)
SETTINGS: Mapping[str, Setting] = {
    "A": Setting(Machine(100_000, (30, 0.22, 0, 0.1)), 2000),
    "B": Setting(Machine(100_000, _H100), 2000),
    "C": Setting(Machine(400_000, _H100), 6000),
    "S": Setting(Machine(20_000, _H100), 500),
    "E": Setting(Machine(60_000, (20, 2, 1e-3, 1)), 1500),
}


def memory_bound_rows(workload: Workload, machine: Machine) -> float:
    """Return how many rows of all ages memory holds."""
    return steady_rows(machine.kv_tokens, workload.prompt_tokens, workload.output_tokens.astype(np.float64))


def budget_ms(workload: Workload, machine: Machine) -> float:
    """Return 1.3 times the step time at half the memory-bound batch, without prefill."""
    half = memory_bound_rows(workload, machine) / 2
    c0, c1, c2, _ = machine.step_ms
    return 1.3 * (c0 + c1 * half + c2 * machine.kv_tokens / 2)


# -- memory ------------------------------------------------------------------------------------------------

_UNTUNED = tuple(map(parse_spec, ("watermark:0", "watermark:0.02", "watermark:0.05", "memory", "predictive")))
_VLLM = Spec("256 rows, wm 0", "static", 256, 0.0)


def memory(given: argparse.Namespace) -> None:
    """Print policies without a budget, relative to the best swept static batch, to the oracle and to Algorithm 1."""
    specs = [*_UNTUNED, _VLLM]
    for letter in given.machines.split(","):
        setting = SETTINGS[letter]
        ratios: dict[str, list[float]] = {spec.text: [] for spec in specs}
        ours: dict[str, list[float]] = {"best static": [], "FIFO oracle": [], "memory": [], _VLLM.text: []}
        lines = [["workload", *(spec.text for spec in specs), "oracle", "bound", "ours / oracle", "ours / memory",
                  "recompute", "rows", "best static"]]  # fmt: skip
        for name in given.workloads.split(","):
            rows: list[list[float]] = []
            for seed in range(given.seeds):
                comparison = Comparison(setting.workload(name, seed), setting.machine, seed)
                best = comparison.best_static
                static = best.outcome
                rate = static.tokens_per_s
                outcomes = {spec.text: comparison.run(spec) for spec in specs}
                own = outcomes["predictive"]
                # The best known run in order of arrival, which may be a static batch.
                oracle = max(
                    comparison.oracle.tokens_per_s, *(o.tokens_per_s for t, o in outcomes.items() if o is not own), rate
                )
                for spec in specs:
                    ratios[spec.text].append(outcomes[spec.text].tokens_per_s / rate)
                against = {"best static": rate, "FIFO oracle": oracle}
                against |= {text: outcomes[text].tokens_per_s for text in ("memory", _VLLM.text)}
                for text, value in against.items():
                    ours[text].append(own.tokens_per_s / value)
                rows.append(
                    [ratios[spec.text][-1] for spec in specs]
                    + [
                        oracle / rate,
                        static.total_s / comparison.lower_bound_s,
                        ours["FIFO oracle"][-1],
                        ours["memory"][-1],
                    ]
                    + [own.recompute_share, own.rows_mean, best.bounds.max_rows]
                )
            *means, recompute, mean_rows, cap = (fmean(column) for column in zip(*rows, strict=True))
            lines.append([name, *(f"{x:.3f}" for x in means), f"{recompute:.1%}", f"{mean_rows:.0f}", f"{cap:.0f}"])
        lines.append(["geomean", *(f"{geomean(ratios[spec.text]):.3f}" for spec in specs)])
        lines[-1] += ["", "", f"{geomean(ours['FIFO oracle']):.3f}", f"{geomean(ours['memory']):.3f}", "", "", ""]
        print(f"\n{letter}: {given.seeds} seeds, {setting.requests} rows; relative to the best static batch")
        tell(lines)
        for text, values in ours.items():
            print(f"predictive / {text}: geomean {geomean(values):.4f}, least {min(values):.3f}", flush=True)


# -- budget ------------------------------------------------------------------------------------------------

_SLA = [
    {"alpha": alpha, "delta": delta, "epsilon_d": epsilon}
    for alpha, delta in ((4, 1), (20, 5)) for epsilon in (0.05, 0.2)
]  # fmt: skip


def budget(given: argparse.Namespace) -> None:
    """Print policies with a budget, relative to the best static batch (cap x prefill chunk swept) that keeps it."""
    for letter in given.machines.split(","):
        setting = SETTINGS[letter]
        lines = [["workload", "budget ms", "best static", "rows x chunk", "bound", "predictive", "over",
                  "paused", "short", "sla published", "over", "sla best swept", "over"]]  # fmt: skip
        all_ratios, all_overs = [], []
        for name in given.workloads.split(","):
            rows = []
            for seed in range(given.seeds):
                workload = setting.workload(name, seed)
                limit = budget_ms(workload, setting.machine)
                comparison = Comparison(workload, setting.machine, seed, limit)
                best = comparison.best_static
                static = best.outcome
                own = comparison.run(parse_spec("predictive"))
                published = _sla(comparison, alpha=20, delta=5, epsilon_d=10.0)
                swept = max(
                    _sla_sweep(comparison) if given.sla else [published],
                    key=lambda outcome: budget_score(outcome, limit),
                )
                rate = static.tokens_per_s
                bound_s = lower_bound_s(workload, setting.machine, budget_ms=limit)
                all_ratios.append(own.tokens_per_s / rate)
                all_overs.append(own.over(limit))
                rows.append([limit, rate, best.bounds.max_rows, best.bounds.prefill_tokens, static.total_s / bound_s,
                             all_ratios[-1], all_overs[-1], own.paused_steps / len(own.step_ms),
                             _short(own, limit), published.tokens_per_s / rate, published.over(limit),
                             swept.tokens_per_s / rate, swept.over(limit)])  # fmt: skip
            m = [fmean(column) for column in zip(*rows, strict=True)]
            lines.append([name, f"{m[0]:.1f}", f"{m[1]:.0f}", f"{m[2]:.0f} x {m[3]:.0f}", f"{m[4]:.3f}", f"{m[5]:.3f}",
                          f"{m[6]:.2%}", f"{m[7]:.0%}", f"{m[8]:.0%}", f"{m[9]:.3f}", f"{m[10]:.1%}",
                          f"{m[11]:.3f}", f"{m[12]:.1%}"])  # fmt: skip
        if not given.sla:
            lines = [line[:-2] for line in lines]
        print(f"\n{letter}: {given.seeds} seeds, {setting.requests} rows")
        tell(lines)
        print(
            f"predictive / best static that keeps the budget: geomean {geomean(all_ratios):.4f}, least "
            f"{min(all_ratios):.3f}; steps over: mean {fmean(all_overs):.2%}, most {max(all_overs):.2%}",
            flush=True,
        )


def _short(outcome: Outcome, limit: float) -> float:
    """Return the share of time spent in steps well below the budget, for lack of rows or memory."""
    return float(outcome.step_ms[outcome.step_ms < 0.85 * limit].sum() / outcome.step_ms.sum())


def _sla(comparison: Comparison, chunk: int = 512, **parameters: float) -> Outcome:
    policy = make_policy("sla", Bounds(1, 1024, comparison.budget_ms, chunk), **parameters)
    return simulate(comparison.workload, comparison.machine, policy, seed=comparison.seed)


def _sla_sweep(comparison: Comparison) -> list[Outcome]:
    """Run Algorithm 2 with 4 settings and 5 prefill chunks, at three target budgets up to the real one."""
    assert comparison.budget_ms is not None
    found = []
    for aim in (0.75, 0.9, 1.0):
        aimed = Comparison(comparison.workload, comparison.machine, comparison.seed, aim * comparison.budget_ms)
        for parameters in _SLA:
            own = parameters | {"epsilon_d": parameters["epsilon_d"] * comparison.budget_ms}
            found += [_sla(aimed, chunk, **own) for chunk in (32, 64, 128, 256, 512)]
    return found


# -- hints -------------------------------------------------------------------------------------------------


def hints(given: argparse.Namespace) -> None:
    """Print the gain from length hints for the predictive policy, relative to the order of arrival."""
    sigmas = (0.0, 0.3, 0.6, 1.0, 1.5)
    lines = [["workload", "order", *(f"error {sigma:g}" for sigma in sigmas), "former epoch"]]
    orders: dict[str, Callable[[Workload, float], Workload]] = {
        "learned": lambda job, _: job,
        "early enough": lambda job, rows: _fixed(job, by_latest_start(job.groups, _hints_of(job), rows)),
        "longest first": lambda job, _: _fixed(job, _longest_first(job.groups, _hints_of(job))),
    }
    setting = SETTINGS["B"]
    for name in given.workloads.split(","):
        gains: dict[str, dict[str, list[float]]] = {order: {} for order in orders}
        for seed in range(given.seeds):
            workload = setting.workload(name, seed)
            rows = memory_bound_rows(workload, setting.machine)
            base = run(parse_spec("predictive"), workload, setting.machine, seed).tokens_per_s
            hinted = {f"error {s:g}": with_hints(workload, s, seed) for s in sigmas} | {
                "former": _former(workload, seed)
            }
            for order, arrange in orders.items():
                for text, own in hinted.items():
                    job = arrange(own, rows)
                    rate = run(parse_spec("predictive"), job, setting.machine, seed).tokens_per_s
                    gains[order].setdefault(text, []).append(rate / base)
        for order, own_gains in gains.items():
            lines.append([name, order, *(f"{geomean(values):.3f}" for values in own_gains.values())])
    print(f"\nB: {given.seeds} seeds, {setting.requests} rows; tokens/s relative to the order of arrival")
    tell(lines)


def useless(given: argparse.Namespace) -> None:
    """Print the cost of useless hints for the predictive policy, relative to the order of arrival."""
    lines = [["workload", "machine", "mean", "standard error"]]
    for letter in given.machines.split(","):
        setting = SETTINGS[letter]
        for name in given.workloads.split(","):
            ratios = []
            for seed in range(given.seeds):
                workload = setting.workload(name, seed)
                jobs = workload, with_hints(workload, math.inf, seed)
                base, rate = (run(parse_spec("predictive"), job, setting.machine, seed).tokens_per_s for job in jobs)
                ratios.append(rate / base)
            error = stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
            lines.append([name, letter, f"{fmean(ratios):.4f}", f"{error:.4f}"])
    print(f"\n{given.seeds} seeds; tokens/s with useless hints relative to the order of arrival")
    tell(lines)


def _hints_of(workload: Workload) -> FloatArray:
    assert workload.length_hints is not None
    return workload.length_hints


def _fixed(workload: Workload, order: IntArray) -> Workload:
    """Return the workload in this order, without hints that would change it."""
    return replace(workload.reordered(order), length_hints=None)


def _longest_first(groups: IntArray, expected: FloatArray) -> IntArray:
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    means = np.bincount(inverse, expected) / np.bincount(inverse)
    return np.lexsort((np.arange(len(groups)), first[inverse], -means[inverse]))


def _former(workload: Workload, seed: int) -> Workload:
    """Add hints from a former epoch: mean lengths per prompt, with a CV of 0.5 between samples of a prompt."""
    sizes = np.bincount(workload.groups)
    means = np.bincount(workload.groups, workload.output_tokens) / np.maximum(sizes, 1)
    noise = np.random.default_rng([seed, 9]).standard_normal(len(sizes))
    # The means of both epochs deviate from the prompt's true mean, hence the factor 2 in the variance.
    seen = means * np.exp(math.sqrt(2 * math.log1p(0.25)) * noise / np.sqrt(np.maximum(sizes, 1)))
    return replace(workload, length_hints=seen[workload.groups])


# -- preemption --------------------------------------------------------------------------------------------


def victims(given: argparse.Namespace) -> None:
    """Print the gain from preempting the row that is cheapest to recompute, relative to the youngest."""
    chosen: dict[str, Victim] = {"youngest": youngest, "cheapest": cheapest}
    lines = [["workload", "machine", "policy", "cheapest / youngest", "recompute: youngest", "cheapest"]]
    ratios: dict[str, list[float]] = {}
    for letter in given.machines.split(","):
        setting = SETTINGS[letter]
        for name in given.workloads.split(","):
            for policy in ("static", "predictive"):
                jobs = [setting.workload(name, seed) for seed in range(given.seeds)]
                runs = {
                    text: [
                        simulate(
                            job, setting.machine, make_policy(policy, Bounds(1, MAX_ROWS)), seed=seed, victim=victim
                        )
                        for seed, job in enumerate(jobs)
                    ]
                    for text, victim in chosen.items()
                }
                rate = {text: geomean(o.tokens_per_s for o in own) for text, own in runs.items()}
                shares = [f"{fmean(o.recompute_share for o in own):.1%}" for own in runs.values()]
                ratios.setdefault(policy, []).append(rate["cheapest"] / rate["youngest"])
                lines.append([name, letter, policy, f"{ratios[policy][-1]:.3f}", *shares])
    tell(lines)
    for policy, values in ratios.items():
        print(f"{policy}: geomean {geomean(values):.4f}, least {min(values):.3f}", flush=True)


# -- forecast ----------------------------------------------------------------------------------------------


def forecast(given: argparse.Namespace) -> None:
    """Print the error of the memory forecast for the live rows, as a share of memory."""
    lines = [["workload", *(f"{steps} steps ahead: median, p95" for steps in AHEAD)]]
    for letter in given.machines.split(","):
        setting = SETTINGS[letter]
        for name in given.workloads.split(","):
            errors = []
            for seed in range(given.seeds):
                job = setting.workload(name, seed)
                policy = Unaware(make_policy("predictive", Bounds(1, MAX_ROWS)), int(job.max_new_tokens.max()))
                simulate(job, setting.machine, policy, seed=seed, reveal=True)
                errors += policy.errors
            lines.append([f"{letter} {name}", *quantiles(errors)])
    print(f"{given.seeds} seeds; |foretold - true| tokens of the live rows, as a share of memory")
    tell(lines)


# -- cost --------------------------------------------------------------------------------------------------


FIGURES: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "memory": memory,
    "budget": budget,
    "hints": hints,
    "useless": useless,
    "victims": victims,
    "forecast": forecast,
    "paper": paper,
    "cost": cost,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("--machines", default=",".join(SETTINGS))
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sla", action="store_true", help="with a budget, sweep Algorithm 2 as well (60 runs each)")
    given = parser.parse_args(arguments)
    FIGURES[given.figure](given)


if __name__ == "__main__":
    main()
