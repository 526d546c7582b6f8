"""What prompts that begin alike share: the engine's counts beside the simulator's, and the time of an admission.

    python -m jobs.bench.prefixes random:tiny
    python -m jobs.bench.prefixes packaged:SmolLM2-135M-Instruct --workloads w6 --kv-tokens 4000 --dtype bfloat16

Engine and simulator run the same requests under the same policy, in memory of the same size. Times of the simulator's
steps do not matter for what it counts, unless memory is so tight that the policy weighs them. The admission of many
waiting prompts is timed on the engine alone.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from jobs.bench.lib import cli, tables, workload
from rollout import Engine, SamplingParams
from rollout.batcher.registry import make_policy
from rollout.batcher.simulation.simulator import Machine, simulate
from rollout.batcher.simulation.workloads import workload_of_prompts
from rollout.batcher.types import Bounds
from rollout.engine.scheduler import Scheduler
from rollout.engine.waiting_queue import WaitingQueue
from rollout.models.runners.select import select_strategy
from rollout.requests import Request, StepReport, in_windows

_STEP_MS = (20.0, 0.5, 1e-4, 0.1)
_TASKS, _TASK_TOKENS, _QUESTION_TOKENS = 100, 96, 32
_FIRST = 1000


def engine_counts(model: Any, work: Sequence[workload.Request], policy: str, kv_tokens: int) -> dict[str, str]:
    """Run a workload on the engine."""
    layout = select_strategy(model).kv_layout()
    reports: list[StepReport] = []
    engine = Engine(model, None, policy=policy, max_kv_bytes=kv_tokens * layout.bytes_per_token)
    requests = [
        Request(str(i), one.ids, SamplingParams(max_new_tokens=one.n, ignore_eos=True)) for i, one in enumerate(work)
    ]
    for _ in engine.run(in_windows(requests, len(requests)), on_step=reports.append):
        pass
    stats = engine.stats
    assert stats is not None
    return _counts(
        hits=stats.prefix_hits,
        reused=stats.reused_tokens,
        saved=stats.pages_saved,
        prefilled=stats.prefilled_tokens,
        steps=stats.steps,
        rows=[report.live_rows for report in reports],
        preempted=stats.preempted_rows,
    )


def simulated_counts(
    work: Sequence[workload.Request], policy: str, kv_tokens: int, page_tokens: int, *, shares: bool
) -> dict[str, str]:
    """Run a workload in the simulator, with common beginnings shared or not."""
    prompts = [one.ids for one in work]
    job = workload_of_prompts("job", prompts, [one.n for one in work], shares=shares)
    machine = Machine(kv_tokens, _STEP_MS, page_tokens=page_tokens)
    outcome = simulate(job, machine, make_policy(policy, Bounds()), reveal=True)
    return _counts(
        hits=outcome.prefix_hits,
        reused=outcome.reused_tokens,
        saved=outcome.pages_saved,
        prefilled=outcome.prefilled_tokens,
        steps=len(outcome.step_ms),
        rows=[outcome.rows_mean],
        preempted=outcome.preempted_rows,
    )


def _counts(
    *, hits: int, reused: int, saved: int, prefilled: int, steps: int, rows: Sequence[float], preempted: int
) -> dict[str, str]:
    return {
        "hits": str(hits),
        "tokens reused": str(reused),
        "pages saved": str(saved),
        "tokens prefilled": str(prefilled),
        "steps": str(steps),
        "rows alive, mean": f"{fmean(rows):.1f}",
        "preempted": str(preempted),
    }


@contextmanager
def _timed(owner: type, name: str) -> Iterator[list[float]]:
    """Collect the seconds of each call of a method."""
    method: Callable[..., Any] = getattr(owner, name)
    seconds: list[float] = []

    def call(*arguments: Any, **keywords: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*arguments, **keywords)
        finally:
            seconds.append(time.perf_counter() - began)

    setattr(owner, name, call)
    try:
        yield seconds
    finally:
        setattr(owner, name, method)


def time_admissions(model: Any, waiting: int, vocabulary: int, *, alike: bool) -> list[str]:
    """Return the times of arranging and admitting prompts that all wait from the start."""
    rng = random.Random(0)

    def drawn(tokens: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocabulary) for _ in range(tokens))

    tasks = [drawn(_TASK_TOKENS) for _ in range(_TASKS)]
    params = SamplingParams(max_new_tokens=1, ignore_eos=True)
    requests = []
    for i in range(waiting):
        begin = rng.choice(tasks) if alike else drawn(_TASK_TOKENS)
        requests.append(Request(str(i), begin + drawn(_QUESTION_TOKENS), params))
    alive: list[int] = []
    engine = Engine(model, None, policy="static", max_rows=256)
    with _timed(Scheduler, "admit") as admitting, _timed(WaitingQueue, "arrange") as arranging:
        for _ in engine.run(in_windows(requests, waiting), on_step=lambda report: alive.append(report.live_rows)):
            pass
    steps = next(step for step in range(1, len(alive) + 1) if sum(alive[:step]) >= min(_FIRST, waiting))
    return [
        f"{waiting} prompts, {f'{_TASKS} beginnings' if alike else 'none alike'}",
        f"{1e3 * sum(arranging):.0f}",
        f"{1e6 * sum(admitting[:steps]) / sum(alive[:steps]):.0f}",
        f"{1e6 * sum(admitting) / waiting:.0f}",
    ]


def main() -> int:
    """Print one table per workload, and one of times."""
    parser = cli.options("Counts what prompts that begin alike share, on the engine and in the simulator.", "cpu")
    parser.set_defaults(dtype="float32")
    parser.add_argument("--workloads", default="w6,w8", help="of jobs/bench/lib/workload.py")
    parser.add_argument("--kv-tokens", type=int, default=100_000, help="tokens that memory holds")
    parser.add_argument("--policy", default="predictive")
    parser.add_argument("--waiting", type=int, default=10_000, help="prompts whose admission is timed; 0: none")
    given = parser.parse_args()
    folder = cli.folder(parser, given)
    model = cli.model(folder, given)
    page_tokens = select_strategy(model).kv_layout().page_size
    for name in given.workloads.split(","):
        work = workload.make(folder, workload.NAMED[name])
        print(f"\n{name}: {workload.describe(work)}; pages of {page_tokens}, {given.kv_tokens} tokens of memory\n")
        runs = {
            "engine": engine_counts(model, work, given.policy, given.kv_tokens),
            "simulator": simulated_counts(work, given.policy, given.kv_tokens, page_tokens, shares=True),
            "simulator, nothing shared": simulated_counts(
                work, given.policy, given.kv_tokens, page_tokens, shares=False
            ),
        }
        tables.tell([["", *runs["engine"]], *([text, *counts.values()] for text, counts in runs.items())])
    if given.waiting:
        print()
        lines = [["waiting", "arranging, ms", f"per admission, first {_FIRST}, µs", "all, µs"]]
        lines += [
            time_admissions(model, given.waiting, model.config.vocab_size, alike=alike) for alike in (True, False)
        ]
        tables.tell(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
