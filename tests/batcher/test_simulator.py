from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rollout.batcher.preemption import Victim, cheapest, youngest
from rollout.batcher.registry import POLICIES, make_policy
from rollout.batcher.simulation.lower_bound import lower_bound_s
from rollout.batcher.simulation.oracle import OraclePolicy
from rollout.batcher.simulation.simulator import Machine, Outcome, simulate
from rollout.batcher.simulation.workloads import WORKLOADS, Workload, named_workload, with_hints, workload_of
from rollout.batcher.types import Bounds, Decision, Observation, Policy

EXACT = Machine(10_000, (10, 1, 0, 0.1), noise=0.0)


def rows(prompts: list[int], outputs: list[int], group: int = 1) -> Workload:
    return workload_of("rows", np.array(prompts), np.array(outputs), 1024, group)


def static(cap: int = 4096, prefill_tokens: int = 2048) -> Policy:
    return make_policy("static", Bounds(1, cap, prefill_tokens=prefill_tokens))


class Watched:
    """A policy, and all that it was shown and said."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.seen: list[Observation] = []
        self.said: list[Decision] = []

    def decide(self, observation: Observation) -> Decision:
        self.seen.append(observation)
        self.said.append(self.policy.decide(observation))
        return self.said[-1]


def test_step_times_of_one_row():
    """A prefill that draws the first token, then a step a token."""
    outcome = simulate(rows([100], [4]), EXACT, static())
    assert outcome.step_ms.tolist() == [10 + 10, 11, 11, 11]
    assert outcome.output_tokens == 4


def test_rows_past_the_cap_wait_and_prefill_goes_beside_decoding():
    outcome = simulate(rows([100, 100], [3, 3]), EXACT, static(1))
    assert outcome.step_ms.tolist() == [20, 11, 11] * 2
    both = simulate(rows([100, 100], [3, 3]), EXACT, static(2, prefill_tokens=100))
    assert both.step_ms.tolist() == [20, 21, 12, 11]


def test_attended_tokens_cost_time():
    machine = Machine(10_000, (10, 0, 1, 0), noise=0.0)
    assert simulate(rows([100], [3]), machine, static()).step_ms.tolist() == [10, 10 + 101, 10 + 102]


def test_long_prompts_are_prefilled_in_parts():
    outcome = simulate(rows([250], [1]), EXACT, static(prefill_tokens=100))
    assert outcome.step_ms.tolist() == [20, 20, 15]


def test_samples_share_the_full_pages_of_their_prompt():
    policy = Watched(static())
    outcome = simulate(rows([100] * 4, [20] * 4, group=4), EXACT, policy)
    assert outcome.step_ms[0] == 20, "prefilled once"
    # Six full pages together, and a partial one each.
    assert policy.seen[1].kv_tokens_held == 16 * (6 + 4)
    groups = policy.seen[1].groups
    assert groups is not None
    assert groups.tolist() == [0] * 4


def test_preempted_row_is_recomputed():
    machine = Machine(16 * 20, (10, 1, 0, 0.1), noise=0.0)
    policy = Watched(static())
    outcome = simulate(rows([100, 100], [100, 100]), machine, policy)
    assert outcome.preempted_rows >= 1
    assert outcome.recompute_s > 0
    waiting = [seen.waiting for seen in policy.seen if seen.waiting is not None and len(seen.waiting)]
    kept = max(int(w.generated_tokens[0]) for w in waiting)
    assert 50 < kept < 80, "its tokens are kept: 20 pages hold two rows of 160 tokens"
    assert outcome.total_s * 1e3 == pytest.approx(
        outcome.recompute_s * 1e3 + 10 * len(outcome.step_ms) + 2 * 10 + (198 - outcome.preempted_rows)
    )


@pytest.mark.parametrize("name", [*POLICIES, "oracle"])
@pytest.mark.parametrize("victim", [youngest, cheapest])
def test_page_accounting_holds_for_every_policy_and_victim(name: str, victim: Victim):
    """Memory is never exceeded, all rows end, and nothing is held at the end."""
    rng = np.random.default_rng(2)
    job = workload_of("any", rng.integers(1, 120, 120), rng.integers(1, 150, 120), 200, 4)
    machine = Machine(1600, (5, 0.1, 1e-4, 0.05))
    made: Policy = OraclePolicy(Bounds()) if name == "oracle" else make_policy(name, Bounds(1, 64, 30.0))
    policy = Watched(made)
    outcome = simulate(job, machine, policy, reveal=name == "oracle", victim=victim)
    finished = [row for seen in policy.seen for row in seen.finished]
    assert outcome.output_tokens == job.output_tokens.sum()
    assert len(finished) >= 117, "the last ones are told to nobody"
    assert not Counter(row.output_tokens for row in finished) - Counter(job.output_tokens.tolist())
    for seen in policy.seen:
        assert seen.kv_tokens_held + seen.kv_tokens_free == 1600
        assert seen.kv_tokens_free >= 0
        groups = seen.groups
        assert groups is not None
        live = seen.generated_tokens > 0
        own = (seen.prompt_tokens + seen.generated_tokens - seen.prompt_tokens // 16 * 16)[live]
        least = own.sum() + (seen.prompt_tokens[live] // 16 * 16)[np.unique(groups[live], return_index=True)[1]].sum()
        # Each row has a page for the token before its next one.
        assert least - live.sum() <= seen.kv_tokens_held
    assert outcome.total_s > 0.95 * lower_bound_s(job, machine)


def test_row_larger_than_memory_raises():
    with pytest.raises(ValueError, match="A row of 300 tokens does not fit into 256 tokens"):
        simulate(rows([200], [100]), Machine(256, (1, 1, 0, 0)), static())


def test_policy_that_stalls_the_job_raises():
    class Stubborn:
        def decide(self, observation: Observation) -> Decision:
            return Decision(8, 0, "no")

    with pytest.raises(ValueError, match="stalled the job"):
        simulate(rows([10], [10]), EXACT, Stubborn())


def test_paused_rows_keep_their_pages_and_resume():
    class Half:
        def decide(self, observation: Observation) -> Decision:
            return Decision(8, 2048, "half", decode_rows=1)

    policy = Watched(Half())
    outcome = simulate(rows([100] * 3, [5, 4, 3]), EXACT, policy)
    assert outcome.paused_steps > 0
    assert outcome.recompute_s == 0
    assert outcome.step_ms.tolist() == [40, *[11] * (4 + 3 + 2)]
    assert [len(seen.generated_tokens) for seen in policy.seen[1:]] == [3] * 4 + [2] * 3 + [1] * 2


def test_memory_can_shrink_and_grow_back():
    job = named_workload("ln0.6", 100)
    machine = Machine(20_000, (5, 0.1, 0, 0.02))
    policy = Watched(make_policy("predictive", Bounds()))
    squeezed = simulate(job, machine, policy, kv_tokens_at=lambda step: 8_000 if 200 <= step < 500 else 20_000)
    assert squeezed.preempted_rows > 0
    assert {seen.kv_tokens_total for seen in policy.seen} == {8_000, 20_000}
    held = [seen.kv_tokens_held for seen in policy.seen]
    assert max(held[200:500]) <= 8_000 < min(max(held[:200]), max(held[500:]))


def test_same_seed_gives_same_run():
    job = named_workload("unif", 60)
    machine = Machine(20_000, (5, 0.1, 0, 0.02))

    def run(seed: int) -> Outcome:
        return simulate(job, machine, make_policy("predictive", Bounds()), seed=seed)

    assert run(1).step_ms.tolist() == run(1).step_ms.tolist() != run(2).step_ms.tolist()


def test_policies_learn_the_noise_and_keep_their_budget():
    job = named_workload("bimod", 100)
    machine = Machine(50_000, (5.5, 0.02, 4.4e-5, 0.02))
    budget = 6.9
    outcome = simulate(job, machine, make_policy("predictive", Bounds(1, 1024, budget)))
    assert outcome.over(budget) < 0.01
    assert outcome.paused_steps > 0


# -- the bound ---------------------------------------------------------------------------------------------


def test_the_bound_of_one_row_is_its_time():
    job = rows([100], [50])
    assert simulate(job, EXACT, static()).total_s == pytest.approx(lower_bound_s(job, EXACT))


def test_the_bound_counts_what_fills_memory_and_prompts_that_are_shared_once():
    machine = Machine(1600, (10, 0, 0, 0), noise=0.0)
    job = rows([96] * 64, [65] * 64)
    held = 64 * (64 * 96 + 64 * 65 // 2)
    assert lower_bound_s(job, machine) == pytest.approx(held / 1600 / 100)
    shared = rows([96] * 64, [65] * 64, group=64)
    assert lower_bound_s(shared, machine) == pytest.approx((64 * 64 * 65 // 2 + 96 * 64) / 1600 / 100)


def test_with_a_budget_the_bound_counts_steps_that_keep_it():
    job = rows([96] * 64, [65] * 64)
    machine = Machine(1_000_000, (10, 1, 0, 0.5), noise=0.01)
    work = 64 * 64 + 0.5 * 64 * 96
    room = 30 / (1 + 2.326 * 0.01) - 10
    assert lower_bound_s(job, machine, budget_ms=30) == pytest.approx((work / room * 10 + work) / 1000)
    assert lower_bound_s(job, machine, budget_ms=1000) == lower_bound_s(job, machine), "the longest row takes as many"
    assert lower_bound_s(job, machine, budget_ms=9) == math.inf


# -- workloads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_named_workloads_are_seeded_and_in_range(name: str):
    job, same, other = (named_workload(name, 200, seed) for seed in (0, 0, 1))
    assert len(job) == 200
    assert (job.prompt_tokens >= 1).all()
    assert ((job.output_tokens >= 1) & (job.output_tokens <= job.max_new_tokens)).all()
    assert job.output_tokens.tolist() == same.output_tokens.tolist()
    assert name == "const" or job.output_tokens.tolist() != other.output_tokens.tolist()
    assert named_workload(name, 50, max_new=20).output_tokens.max() <= 20


def test_the_traces_have_their_published_means():
    for name, prompt, output in (("conv", 1155, 211), ("code", 2048, 27.9)):
        job = named_workload(name, 20_000)
        assert job.prompt_tokens.mean() == pytest.approx(prompt, rel=0.04)
        assert job.output_tokens.mean() == pytest.approx(output, rel=0.1)


def test_groups_have_one_prompt():
    job = named_workload("conv", 64, group=8)
    assert len(set(job.groups.tolist())) == 8
    for group in range(8):
        assert len(set(job.prompt_tokens[job.groups == group].tolist())) == 1
    assert len(set(named_workload("grpo", 64).groups.tolist())) == 4


def test_hints_go_with_their_rows():
    job = with_hints(named_workload("geom", 100), 0.0)
    order = np.random.default_rng(0).permutation(100)
    taken = job.reordered(order)
    assert taken.length_hints is not None
    assert taken.length_hints.tolist() == taken.output_tokens.tolist()
    useless = with_hints(job, float("inf")).length_hints
    assert useless is not None
    assert sorted(useless.tolist()) == sorted(job.output_tokens.tolist())
    assert replace(job, length_hints=None).reordered(order).length_hints is None
