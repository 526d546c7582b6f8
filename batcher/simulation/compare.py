"""Policies side by side on a job: by specification, against the best static batch and the oracle."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from rollout.batcher.registry import POLICIES, make_policy
from rollout.batcher.simulation.lower_bound import lower_bound_s
from rollout.batcher.simulation.oracle import OraclePolicy
from rollout.batcher.simulation.simulator import WATERMARK, Machine, Outcome, simulate
from rollout.batcher.simulation.workloads import Workload
from rollout.batcher.types import Bounds, Policy

MAX_ROWS = 4096
"""Cap of policies that are given none: more than memory holds in any of the usual settings."""
KEPT = 0.01
"""A policy keeps its budget when no larger share of its steps goes beyond."""
_SWEEP = 1.12
_CHUNKS = (32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Spec:
    """What ``NAME[:VALUE]`` names: a policy and its cap, or the share that an engine without cap leaves free."""

    text: str
    name: str
    max_rows: int = MAX_ROWS
    watermark: float = WATERMARK


def parse_spec(text: str) -> Spec:
    """``static:256`` is a policy with at most 256 rows, ``watermark:0.02`` all rows that memory leaves room for.

    Raises:
        ValueError: there is no such policy, or the value is none; in one sentence.
    """
    name, colon, value = text.strip().partition(":")
    names = [*POLICIES, "watermark", "oracle"]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"There is no policy {name!r}; the nearest is {nearest!r} (known: {', '.join(names)}).")
    if name == "watermark":
        share = _number(value or str(WATERMARK))
        if share is None or not 0 <= share < 1:
            raise ValueError(f"{text!r} is no policy: write watermark:SHARE with a share from 0 to below 1.")
        return Spec(text, name, watermark=share)
    if not colon:
        return Spec(text, name)
    rows = _number(value)
    if rows is None or rows != int(rows) or rows < 1:
        raise ValueError(f"{text!r} is no policy: write {name}:ROWS with the most rows, at least 1.")
    return Spec(text, name, max_rows=int(rows))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def run(spec: Spec, workload: Workload, machine: Machine, seed: int = 0, budget_ms: float | None = None) -> Outcome:
    """One policy on a job."""
    bounds = Bounds(1, spec.max_rows, budget_ms)
    if spec.name == "oracle":
        # It knows what others keep room for.
        return simulate(workload, machine, OraclePolicy(bounds), seed=seed, watermark=0.0, reveal=True)
    policy: Policy = make_policy("static" if spec.name == "watermark" else spec.name, bounds)
    return simulate(workload, machine, policy, seed=seed, watermark=spec.watermark)


class Comparison:
    """A job and a machine, and what policies are compared with there.

    Args:
        workload, machine: see `simulate`.
        seed: of the noise.
        budget_ms: of a step; None is none.
    """

    def __init__(self, workload: Workload, machine: Machine, seed: int = 0, budget_ms: float | None = None) -> None:
        self.workload, self.machine, self.seed, self.budget_ms = workload, machine, seed, budget_ms

    def run(self, spec: Spec) -> Outcome:
        """What a policy makes of it."""
        return run(spec, self.workload, self.machine, self.seed, self.budget_ms)

    @cached_property
    def lower_bound_s(self) -> float:
        """See `bound.lower_bound_s`."""
        return lower_bound_s(self.workload, self.machine)

    @cached_property
    def oracle(self) -> Outcome:
        """In the order of arrival, with all lengths known, and without a budget."""
        return run(Spec("oracle", "oracle"), self.workload, self.machine, self.seed)

    @cached_property
    def best_static(self) -> tuple[Bounds, Outcome]:
        """The best of static batches, in steps of 12 %; with a budget of all that keep it, prefill chunk swept too.

        Where none keeps the budget, it is the one that comes nearest.
        """
        caps = self._caps()
        chunks = (Bounds().prefill_tokens,) if self.budget_ms is None else _CHUNKS
        tried: dict[tuple[int, int], tuple[float, float, Bounds, Outcome]] = {}

        def rate(at: int, chunk: int) -> tuple[float, float]:
            if (at, chunk) not in tried:
                bounds = Bounds(1, caps[at], self.budget_ms, chunk)
                outcome = simulate(self.workload, self.machine, make_policy("static", bounds), seed=self.seed)
                over = 0.0 if self.budget_ms is None else outcome.over(self.budget_ms)
                tried[at, chunk] = (-max(over, KEPT), outcome.tokens_per_s, bounds, outcome)
            return tried[at, chunk][:2]

        for chunk in chunks:
            # Coarsely, then finely about the best of them.
            best = max(range(0, len(caps), 4), key=lambda at: rate(at, chunk))
            for at in range(max(0, best - 3), min(len(caps), best + 4)):
                rate(at, chunk)
        _, _, bounds, outcome = max(tried.values(), key=lambda entry: entry[:2])
        return bounds, outcome

    def _caps(self) -> Sequence[int]:
        """From all rows that memory could hold at their mean length and more, down to few."""
        mean = float((self.workload.prompt_tokens + self.workload.output_tokens / 2).mean())
        most = min(len(self.workload), max(16.0, 3 * self.machine.kv_tokens / mean))
        return tuple(dict.fromkeys(_falling(most)))


def _falling(most: float) -> Iterator[int]:
    while most >= 4:
        yield int(most)
        most /= _SWEEP
