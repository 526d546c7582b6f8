from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rollout.batcher
from rollout.batcher.policies.memory import MemoryPolicy
from rollout.batcher.policies.paper import PaperPolicy
from rollout.batcher.policies.predictive import PredictivePolicy
from rollout.batcher.policies.sla import SlaPolicy
from rollout.batcher.policies.static import StaticPolicy
from rollout.batcher.registry import POLICIES, bounded, make_policy
from rollout.batcher.types import OVER_BUDGET, Bounds, Decision, FinishedRow, Observation
from tests.support.observations import observe, step

ROWS_OF_200 = [FinishedRow(100, 100)] * 50


def test_make_policy_builds_policy_by_name():
    made = {name: type(make_policy(name, Bounds())) for name in POLICIES}
    assert made == {
        "static": StaticPolicy,
        "memory": MemoryPolicy,
        "sla": SlaPolicy,
        "paper": PaperPolicy,
        "predictive": PredictivePolicy,
    }


def test_parameters_reach_the_policy():
    seen = observe([1] * 10, eta=10_000, finished=[FinishedRow(100, 50), FinishedRow(100, 150)] * 50)
    assert make_policy("memory", Bounds(), epsilon_m=0.01).decide(seen).rows == 46
    assert make_policy("paper", Bounds(), epsilon_m=0.01).decide(seen).rows == 46


@pytest.mark.parametrize(
    ("wrong", "right"), [("memroy", "memory"), ("papers", "paper"), ("slo", "sla"), ("statik", "static")]
)
def test_unknown_name_raises_with_nearest(wrong: str, right: str):
    with pytest.raises(ValueError, match=f"no policy '{wrong}'; the nearest is '{right}"):
        make_policy(wrong, Bounds())


def test_unknown_parameter_raises_with_nearest():
    with pytest.raises(ValueError, match=r"'sla' has no parameter 'epsilon'; the nearest is 'epsilon_d'"):
        make_policy("sla", Bounds(), epsilon=1)
    with pytest.raises(ValueError, match=r"'static' has no parameter 'rows'; it has none"):
        make_policy("static", Bounds(), rows=1)


@pytest.mark.parametrize("bounds", [Bounds(0, 8), Bounds(9, 8)])
def test_inconsistent_bounds_raise(bounds: Bounds):
    with pytest.raises(ValueError, match="min_rows"):
        make_policy("static", bounds)


def test_static_policy_allows_max_rows():
    assert make_policy("static", Bounds(1, 256, prefill_tokens=512)).decide(observe()) == Decision(256, 512, "cap")


def test_paper_policy_takes_smaller_batch_and_its_reason():
    def decide(eta: int, ms: float) -> Decision:
        policy = make_policy("paper", Bounds(1, 400, 50), step_window=1)
        return policy.decide(observe([1] * 10, eta=eta, steps=[step(200, ms)], finished=ROWS_OF_200))

    assert decide(10_000, 90) == Decision(50, 2048, "memory")
    assert decide(60_000, 90) == Decision(100, 2048, "latency")
    assert decide(80_000, 10) == Decision(300, 2048, "latency")
    assert decide(50_000, 10) == Decision(250, 2048, "memory")


def test_paper_without_a_budget_is_memory_up_to_the_cap():
    policy = make_policy("paper", Bounds(1, 400))
    seen = observe([1] * 10, eta=1_000_000, finished=ROWS_OF_200, steps=[step(10, 1e6)] * 50)
    assert policy.decide(seen) == Decision(400, 2048, "cap")


def test_paper_policy_reports_over_budget_even_where_memory_is_as_tight():
    policy = make_policy("paper", Bounds(1, 8, 50), step_window=1)
    for _ in range(8):
        decision = policy.decide(observe([1], eta=200, steps=[step(1, 90)], finished=ROWS_OF_200))
    assert decision == Decision(1, 2048, OVER_BUDGET)


def a_random_job(rng: np.random.Generator, length: int) -> list[Observation]:
    """Observations without sense or order, so that no policy can rely on any."""
    job = []
    for _ in range(length):
        live = int(rng.choice([0, 1, rng.integers(0, 600)]))
        job.append(
            observe(
                [int(n) for n in rng.integers(0, 300, live)],
                prompt=int(rng.integers(0, 300)),
                max_new=int(rng.integers(1, 400)),
                waiting=int(rng.integers(0, 3)),
                eta=int(rng.choice([0, 100, rng.integers(0, 1_000_000)])),
                steps=[
                    step(int(rng.integers(0, 600)), float(rng.exponential(50))) for _ in range(int(rng.integers(0, 4)))
                ],
                finished=[
                    FinishedRow(int(rng.integers(0, 300)), int(rng.integers(0, 400)))
                    for _ in range(int(rng.integers(0, 3)))
                ],
            )
        )
    return job


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_decisions_keep_bounds_and_decoding_rows_for_random_observations(name: str, seed: int):
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for _ in range(8):
        min_rows = int(rng.integers(1, 50))
        bounds = Bounds(min_rows, min_rows + int(rng.integers(0, 500)), float(rng.choice([5, 50, 500])), 64)
        policy = make_policy(name, bounds, **({"step_window": 2} if name in ("sla", "paper") else {}))
        for seen in a_random_job(rng, 40):
            decision = policy.decide(seen)
            decoding = int((seen.generated_tokens > 0).sum())
            assert bounds.min_rows <= decision.rows <= bounds.max_rows
            assert decision.rows >= min(decoding, bounds.max_rows)
            assert 0 <= decision.prefill_tokens <= 64
            assert decision.prefill_tokens == 64 or name == "predictive"
            assert decision.decode_rows is None or 0 <= decision.decode_rows <= seen.live_rows
            assert decision.decode_rows or decision.decode_rows is None or not decoding, "somebody goes on"
            assert decision.reason.isidentifier()


def test_paper_is_never_looser_than_either_algorithm():
    reasons = set()
    for seed in range(4):
        print(f"seed {seed}")
        bounds = Bounds(1, 300, 50)
        memory = make_policy("memory", bounds)
        sla = make_policy("sla", bounds, step_window=2)
        paper = make_policy("paper", bounds, step_window=2)
        for seen in a_random_job(np.random.default_rng(seed), 100):
            decision = paper.decide(seen)
            assert decision.rows == min(memory.decide(seen).rows, sla.decide(seen).rows)
            reasons.add(decision.reason)
    assert {"memory", "latency"} <= reasons, "both algorithms must have been the tighter one"


def test_batcher_loads_neither_torch_nor_transformers():
    script = (
        "import sys; before = set(sys.modules); import rollout.batcher.registry;"
        "print(*sorted({'torch', 'transformers', 'rollout.batcher.registry'} & set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == ["rollout.batcher.registry"]


def test_batcher_reads_no_clock_and_does_no_io():
    allowed = {
        "__future__", "collections", "dataclasses", "difflib", "functools", "heapq", "inspect", "itertools", "math",
        "numpy", "statistics", "typing",
    }  # fmt: skip
    modules = list(Path(next(iter(rollout.batcher.__path__))).rglob("*.py"))
    assert len(modules) > 5
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in names:
                assert name.startswith("rollout.batcher.") or name.split(".")[0] in allowed, (module.name, name)


class Fixed:
    """A caller's policy: always the same target."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def decide(self, observation: Observation) -> Decision:
        return Decision(self.rows, 7, "fixed", decode_rows=2)


@pytest.mark.parametrize(("rows", "held"), [(1, 2), (3, 3), (99, 5)])
def test_a_callers_policy_is_held_to_the_bounds(rows: int, held: int) -> None:
    decision = bounded(Fixed(rows), Bounds(min_rows=2, max_rows=5)).decide(observe())
    assert decision == Decision(held, 7, "fixed", decode_rows=2)


@pytest.mark.parametrize("policy", [None, 3, Fixed, object()])
def test_an_object_that_decides_nothing_is_refused(policy: object) -> None:
    with pytest.raises(ValueError, match=r"policy is .*decide\(observation\)"):
        bounded(policy, Bounds())


def test_a_budget_is_refused_for_a_callers_policy() -> None:
    with pytest.raises(ValueError, match="latency_budget_ms is only for policies that are made by name"):
        bounded(Fixed(1), Bounds(latency_budget_ms=5))


def test_a_policy_of_this_package_keeps_its_own_bounds() -> None:
    policy = make_policy("sla", Bounds(latency_budget_ms=5))
    assert bounded(policy, Bounds(latency_budget_ms=5)) is policy
