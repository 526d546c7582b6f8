"""Compare policies on a simulated job with the best static batch, the oracle and a lower bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from rollout.batcher.registry import POLICIES, make_policy
from rollout.batcher.simulation.lower_bound import lower_bound_s
from rollout.batcher.simulation.oracle import OraclePolicy
from rollout.batcher.simulation.simulator import WATERMARK, Machine, Outcome, simulate
from rollout.batcher.simulation.workloads import Workload
from rollout.batcher.suggestions import describe_names
from rollout.batcher.types import Bounds

MAX_ROWS = 4096
"""``max_rows`` of a policy whose specification gives none; memory holds fewer rows in the usual settings."""
MAX_OVER_BUDGET_SHARE = 0.01
"""A policy keeps its budget if at most this share of its steps exceeds it."""
_CAP_RATIO = 1.12
_PREFILL_CHUNKS = (32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Spec:
    """A policy to simulate, written ``NAME[:VALUE]``."""

    text: str
    name: str
    max_rows: int = MAX_ROWS
    watermark: float = WATERMARK
    """Share of the pool that admission leaves free while rows are live."""


def parse_spec(text: str) -> Spec:
    """Parse ``static:256`` (a policy with at most 256 rows) or ``watermark:0.02`` (as many rows as memory admits).

    Raises:
        ValueError: the policy is unknown, or the value is malformed.
    """
    name, colon, value = text.strip().partition(":")
    names = [*POLICIES, "watermark", "oracle"]
    if name not in names:
        raise ValueError(f"There is no policy {name!r}; {describe_names(name, names)}.")
    if name == "watermark":
        share = _parse_number(value or str(WATERMARK))
        if share is None or not 0 <= share < 1:
            raise ValueError(f"{text!r} is not a policy; write watermark:SHARE with a share from 0 to below 1.")
        return Spec(text, name, watermark=share)
    if not colon:
        return Spec(text, name)
    rows = _parse_number(value)
    if rows is None or not rows.is_integer() or rows < 1:
        raise ValueError(f"{text!r} is not a policy; write {name}:ROWS with the most live rows, at least 1.")
    return Spec(text, name, max_rows=int(rows))


def _parse_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def run(spec: Spec, workload: Workload, machine: Machine, seed: int = 0, budget_ms: float | None = None) -> Outcome:
    """Simulate a policy on a job."""
    bounds = Bounds(min_rows=1, max_rows=spec.max_rows, latency_budget_ms=budget_ms)
    if spec.name == "oracle":
        # The oracle knows when rows end, so it needs no watermark.
        return simulate(workload, machine, OraclePolicy(bounds), seed=seed, watermark=0.0, reveal=True)
    policy = make_policy("static" if spec.name == "watermark" else spec.name, bounds)
    return simulate(workload, machine, policy, seed=seed, watermark=spec.watermark)


class StaticResult(NamedTuple):
    """Outcome of a static batch."""

    bounds: Bounds
    outcome: Outcome
    score: tuple[float, float]
    """Sort key: batches that keep the budget first, then tokens per second."""


class Comparison:
    """A job on a machine, with the references that policies are compared with.

    Args:
        workload: rows of the job.
        machine: costs and memory.
        seed: seed of the noise in step times.
        budget_ms: latency budget of a step; None: no budget.
    """

    def __init__(self, workload: Workload, machine: Machine, seed: int = 0, budget_ms: float | None = None) -> None:
        self.workload = workload
        self.machine = machine
        self.seed = seed
        self.budget_ms = budget_ms

    def run(self, spec: Spec) -> Outcome:
        """Simulate a policy."""
        return run(spec, self.workload, self.machine, seed=self.seed, budget_ms=self.budget_ms)

    @cached_property
    def lower_bound_s(self) -> float:
        """Lower bound on the time in seconds, without a budget."""
        return lower_bound_s(self.workload, self.machine)

    @cached_property
    def oracle(self) -> Outcome:
        """Outcome of the oracle: order of arrival, known lengths, no budget."""
        return run(Spec("oracle", "oracle"), self.workload, self.machine, seed=self.seed)

    @cached_property
    def best_static(self) -> StaticResult:
        """Best static batch, over caps in steps of 12 %, and over prefill chunks if there is a budget.

        With a budget, only batches that keep it count; if none does, the nearest to keeping it is returned.
        """
        caps = self._caps()
        chunks = (Bounds().prefill_tokens,) if self.budget_ms is None else _PREFILL_CHUNKS
        results: dict[tuple[int, int], StaticResult] = {}

        def score(index: int, chunk: int) -> tuple[float, float]:
            if (index, chunk) not in results:
                results[index, chunk] = self._run_static(caps[index], chunk)
            return results[index, chunk].score

        for chunk in chunks:
            # Every fourth cap first, then all caps around the best of them.
            best = max(range(0, len(caps), 4), key=lambda index: score(index, chunk))
            for index in range(max(0, best - 3), min(len(caps), best + 4)):
                score(index, chunk)
        return max(results.values(), key=lambda result: result.score)

    def _run_static(self, cap: int, chunk: int) -> StaticResult:
        bounds = Bounds(min_rows=1, max_rows=cap, latency_budget_ms=self.budget_ms, prefill_tokens=chunk)
        outcome = simulate(self.workload, self.machine, make_policy("static", bounds), seed=self.seed)
        return StaticResult(bounds=bounds, outcome=outcome, score=budget_score(outcome, self.budget_ms))

    def _caps(self) -> Sequence[int]:
        """Return the caps to try, from three times the rows that memory holds at half their output down to 4."""
        mean_tokens = float((self.workload.prompt_tokens + self.workload.output_tokens / 2).mean())
        largest = min(len(self.workload), max(16.0, 3 * self.machine.kv_tokens / mean_tokens))
        return tuple(dict.fromkeys(_falling_caps(largest)))


def budget_score(outcome: Outcome, budget_ms: float | None) -> tuple[float, float]:
    """Return a sort key: outcomes that keep the budget first, then by tokens per second."""
    over = 0.0 if budget_ms is None else outcome.over(budget_ms)
    return -max(over, MAX_OVER_BUDGET_SHARE), outcome.tokens_per_s


def _falling_caps(largest: float) -> Iterator[int]:
    while largest >= 4:
        yield int(largest)
        largest /= _CAP_RATIO
