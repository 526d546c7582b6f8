"""Batching policies on the real engine, with too little memory for all rows: the counterpart of policies_simulated.py.

    python -m jobs.bench.policies_on_engine MODEL w1.json --kv-rows 40 --repeats 2
    python -m jobs.bench.policies_on_engine MODEL w1.json --kv-rows 40 --budget-ms 40 --policies sla,predictive

Policies take turns in one process, on one model. KV memory holds ``--kv-rows`` rows of mean final length.
Each request generates its exact number of tokens, but policies see one limit for all, as a user would set it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np

from jobs.bench.lib import cli, tables, workload
from jobs.bench.lib.hidden_limits import AHEAD, Unaware, quantiles
from rollout import Engine, SamplingParams
from rollout.batcher.estimators.step_time import StepTime
from rollout.batcher.registry import make_policy
from rollout.batcher.types import Bounds, Policy, StepSample
from rollout.models.runners.select import select_strategy
from rollout.requests import Request, StepReport
from rollout.stats import Stats

POLICIES = (
    "static:16,static:24,static:32,static:40,static:48,static:56,static:64,static:80,static:96,static:128,"
    "memory,sla,paper,predictive"
)
_KNOWN_AFTER = 64
"""Steps after which the error of the step-time fit is recorded."""


@dataclass(frozen=True, slots=True)
class Setting:
    """``NAME[:ROWS[xCHUNK]]``: a policy, its cap, and the most tokens prefilled in a step."""

    text: str
    name: str
    rows: int
    chunk: int

    @classmethod
    def of(cls, text: str) -> Setting:
        """Parse a setting.

        Raises:
            ValueError: rows or chunk is not a number, or the policy is unknown.
        """
        name, _, bounds = text.partition(":")
        rows, _, chunk = bounds.partition("x")
        usual = Bounds()
        if not all(number.isdecimal() for number in (rows, chunk) if number):
            raise ValueError(f"{text!r} is not a setting; write NAME[:ROWS[xCHUNK]] with whole numbers.")
        setting = cls(text, name, int(rows or usual.max_rows), int(chunk or usual.prefill_tokens))
        setting.policy(None)
        return setting

    def policy(self, budget_ms: float | None) -> Policy:
        """Build a new policy without state."""
        return make_policy(self.name, Bounds(1, self.rows, budget_ms, self.chunk))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one run."""

    stats: Stats
    step_ms: tuple[float, ...]
    rows: tuple[int, ...]
    """[steps] live rows."""
    errors: tuple[float, ...]
    """Relative errors of the step time predicted from earlier steps."""
    tokens: tuple[tuple[float, ...], ...]
    """`Unaware.errors`."""


def errors_of(steps: Sequence[StepSample]) -> list[float]:
    """Return relative errors of the step-time fit of `predictive`, after its first steps."""
    fit, errors = StepTime(), list[float]()
    for step in steps:
        if fit.samples >= _KNOWN_AFTER:
            errors.append(fit.predict(step.rows, step.kv_tokens, step.prefill_tokens) / step.ms - 1)
        fit.learn([step])
    return errors


def run(engine: Engine, policy: Unaware, requests: Sequence[Request]) -> Outcome:
    """Run all requests under a policy."""
    reports: list[StepReport] = []
    for _ in engine.run(requests, on_step=reports.append):
        pass
    assert engine.stats is not None
    times, rows = (report.step_ms for report in reports), (report.live_rows for report in reports)
    return Outcome(engine.stats, tuple(times), tuple(rows), tuple(errors_of(policy.steps)), tuple(policy.errors))


def lines(outcomes: dict[str, list[Outcome]], budget_ms: float | None) -> tables.Lines:
    """Build the table: rates are medians over the runs of a policy, other figures means."""
    over = {
        text: 0.0 if budget_ms is None else fmean(float(np.mean(np.array(o.step_ms) > budget_ms)) for o in own)
        for text, own in outcomes.items()
    }
    rates = {text: median(o.stats.tokens_per_s for o in own) for text, own in outcomes.items()}
    kept = [rates[text] for text in rates if text.startswith("static") and over[text] <= 0.01]
    rows = [
        ["policy", "tok/s, each run", "/ best static", "rows", "preempted", "recomputed", "step p50 ms", "p95 ms"]
        + ([f"over {budget_ms:g} ms", "paused"] if budget_ms else [])
        + ["deciding", "changes an hour", "error of step time, median, p95"]
        + [f"of tokens held {steps} steps ahead" for steps in AHEAD]
    ]
    for text, own in outcomes.items():
        stats = [o.stats for o in own]
        computed = fmean(s.recomputed_tokens / max(1, s.prefilled_tokens + s.output_tokens) for s in stats)
        times = np.concatenate([o.step_ms for o in own])
        errors = np.abs(np.concatenate([o.errors for o in own]))
        rows.append(
            [
                text,
                ", ".join(f"{s.tokens_per_s:.0f}" for s in stats),
                f"{rates[text] / max(kept):.3f}" if kept else "",
                f"{fmean(fmean(o.rows) for o in own):.1f}",
                f"{fmean(s.preempted_rows for s in stats):.0f}",
                f"{computed:.1%}",
                *(f"{np.quantile(times, q):.1f}" for q in (0.5, 0.95)),
            ]
            + ([f"{over[text]:.2%}", f"{fmean(s.paused_row_steps for s in stats):.0f}"] if budget_ms else [])
            + [
                f"{fmean(s.deciding_seconds / s.seconds for s in stats):.2%}",
                f"{fmean(3600 * s.target_changes / s.seconds for s in stats):.0f}",
                ", ".join(f"{np.quantile(errors, q):.1%}" for q in (0.5, 0.95)) if len(errors) else "",
                *quantiles(error for o in own for error in o.tokens),
            ]
        )
    return rows


def main() -> int:
    """Print one line per run, then the table."""
    parser = cli.options("Runs batching policies on the engine, turn by turn.", device="cpu")
    parser.add_argument("workload", type=Path, help="a file of workload.py")
    parser.add_argument("--kv-rows", type=float, default=40.0, help="rows of mean final length that memory holds")
    parser.add_argument("--policies", default=POLICIES, help="NAME[:ROWS[xCHUNK]],...")
    parser.add_argument("--budget-ms", type=float, help="of a step")
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    folder = cli.folder(parser, given)
    try:
        settings = [Setting.of(text) for text in given.policies.split(",")]
        work = workload.read(given.workload)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    model = cli.model(folder, given)
    layout = select_strategy(model).kv_layout()
    mean = fmean(len(request.ids) + request.n for request in work)
    max_kv_bytes = int(given.kv_rows * layout.pages_for(int(mean)) * layout.bytes_per_page)
    limit = max(request.n for request in work)
    requests = [
        Request(str(i), request.ids, SamplingParams(max_new_tokens=request.n, ignore_eos=True))
        for i, request in enumerate(work)
    ]
    print(f"{max_kv_bytes / 1e6:.0f} MB of KV memory, rows of {mean:.0f} tokens on average", flush=True)
    outcomes: dict[str, list[Outcome]] = {setting.text: [] for setting in settings}
    for repeat in range(given.repeats):
        print(f"turn {repeat + 1} of {given.repeats}", flush=True)
        for setting in settings:
            policy = Unaware(setting.policy(given.budget_ms), limit)
            outcome = run(Engine(model, None, policy=policy, max_kv_bytes=max_kv_bytes), policy, requests)
            outcomes[setting.text].append(outcome)
            stats = outcome.stats
            print(f"  {setting.text}: {stats.tokens_per_s:.1f} tok/s, {stats.preempted_rows} preempted", flush=True)
    print(tables.render(lines(outcomes, given.budget_ms)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
