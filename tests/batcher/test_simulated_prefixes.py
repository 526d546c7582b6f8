"""Simulated jobs whose prompts begin alike: computed once, stored once, kept while rows wait for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rollout.batcher.preemption import recompute_tokens
from rollout.batcher.registry import POLICIES, make_policy
from rollout.batcher.simulation.lower_bound import lower_bound_s
from rollout.batcher.simulation.oracle import OraclePolicy
from rollout.batcher.simulation.prefixes import labelled
from rollout.batcher.simulation.simulator import Machine, simulate
from rollout.batcher.simulation.workloads import Workload, named_workload, workload_of, workload_of_prompts
from rollout.batcher.types import Bounds, Decision, Observation, Policy, SharedPages

EXACT = Machine(100_000, (10, 1, 0, 0.1), noise=0.0)


class Watched:
    """A policy, and all that it was shown."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.seen: list[Observation] = []

    def decide(self, observation: Observation) -> Decision:
        self.seen.append(observation)
        return self.policy.decide(observation)


def static(cap: int = 4096, prefill_tokens: int = 2048) -> Policy:
    return make_policy("static", Bounds(1, cap, prefill_tokens=prefill_tokens))


def alike(rests: list[int], outputs: list[int], common: int = 160, group: int = 1) -> Workload:
    """Prompts of ``common`` equal tokens and a rest each."""
    rows = len(rests)
    job = workload_of("alike", common + np.array(rests), np.array(outputs), 1024, group)
    return replace(job, prefixes=labelled(["a"] * rows, np.full(rows, common)))


def test_rows_wait_for_their_beginning_and_compute_only_the_rest():
    policy = Watched(static())
    outcome = simulate(alike([10, 20, 30], [3, 3, 3]), EXACT, policy)
    # 170 tokens, then the other rests beside the first row, then three rows, then the two that came later.
    assert outcome.step_ms.tolist() == [10 + 17, 10 + 1 + 5, 13, 12]
    # Ten pages in common, and one, two and two a row.
    assert policy.seen[2].kv_tokens_held == 16 * (10 + 1 + 2 + 2)
    shared = policy.seen[2].shared
    assert shared is not None
    assert (shared.tokens.tolist(), shared.rows.tolist()) == ([160], [0, 1, 2])
    first = policy.seen[0].waiting
    assert first is not None
    assert first.shared_tokens is not None
    assert first.shared_tokens.tolist() == [0, 160, 160]


def test_beginnings_shorter_than_a_page_keep_nobody_waiting():
    outcome = simulate(alike([10, 20], [1, 1], common=15), EXACT, static())
    assert outcome.step_ms.tolist() == [10 + 2.5 + 3.5]


def test_a_prompt_that_begins_another_computes_its_last_token():
    job = workload_of_prompts("nested", [list(range(64)), list(range(48)), [*range(64), 1]], [1, 1, 1])
    outcome = simulate(job, EXACT, static())
    assert outcome.step_ms.tolist() == pytest.approx([10 + 6.4, 10 + 0.1 + 0.1])


@pytest.mark.parametrize(("common", "computed"), [(163, 13), (164, 9)])
def test_tokens_of_a_page_in_common_are_copied_if_that_pays(common: int, computed: int):
    outcome = simulate(alike([173 - common] * 2, [1, 1], common=common), EXACT, static())
    assert outcome.step_ms.tolist() == pytest.approx([10 + 17.3, 10 + 0.1 * computed])


def test_rows_pass_those_that_wait_and_those_that_begin_alike_stand_together():
    job = workload_of("mixed", np.array([170, 50, 180, 60]), np.ones(4), 1024)
    job = replace(job, prefixes=labelled(["a", "b", "a", ""], np.array([160, 48, 160, 0])))
    # The second of the first task waits; the other two prompts are computed beside the first.
    assert simulate(job, EXACT, static()).step_ms.tolist() == [10 + 17 + 5 + 6, 10 + 2]
    waiting = Watched(static(1))
    simulate(job, EXACT, waiting)
    first = waiting.seen[0].waiting
    assert first is not None
    assert first.prompt_tokens.tolist() == [170, 180, 50, 60]


def test_a_beginning_in_several_chunks_is_waited_for():
    outcome = simulate(alike([10, 20], [1, 1]), EXACT, static(prefill_tokens=100))
    assert outcome.step_ms.tolist() == [20, 10 + 7, 10 + 2]


def test_samples_of_a_prompt_share_all_of_it_and_the_beginning_with_others():
    policy = Watched(static())
    simulate(alike([20] * 4, [5] * 4, group=2), EXACT, policy)
    full = policy.seen[3].shared
    assert full is not None
    pieces = dict(zip(full.tokens.tolist(), full.holders.tolist(), strict=True))
    assert pieces == {160: 4, 16: 2}
    assert policy.seen[3].kv_tokens_held == 16 * (10 + 2 * 1 + 4)


def test_a_beginning_is_kept_for_waiting_rows_alone():
    policy = Watched(static(1))
    outcome = simulate(alike([16, 16, 16], [2, 2, 2]), EXACT, policy)
    assert outcome.step_ms.tolist() == [10 + 17.6, 11] + [10 + 1.6, 11] * 2
    # While no row is live it is free memory, which the next row would take.
    assert [seen.kv_tokens_held for seen in policy.seen if not seen.live_rows] == [0, 0, 0]
    waiting = policy.seen[2].waiting
    assert waiting is not None
    assert waiting.shared_tokens is not None
    assert waiting.shared_tokens.tolist() == [0, 160]


class AllThenOne:
    """Three rows at first, and then one."""

    def __init__(self) -> None:
        self.rows = 3

    def decide(self, observation: Observation) -> Decision:
        rows, self.rows = self.rows, 1
        return Decision(max(rows, observation.live_rows), 2048, "test")


@pytest.mark.parametrize(("pages", "recomputed"), [(40, 0), (26, 160)])
def test_kept_beginnings_give_way_and_are_computed_again(pages: int, recomputed: int):
    """While a row grows to eight pages, the beginning that fewer rows wait for is evicted."""
    job = workload_of("grows", np.array([16, 170, 170, 170, 170, 170]), np.array([112, 1, 1, 1, 1, 1]), 1024)
    job = replace(job, prefixes=labelled(["", "b", "a", "a", "a", "b"], np.array([0, 160, 160, 160, 160, 160])))
    outcome = simulate(job, replace(EXACT, kv_tokens=16 * pages), AllThenOne())
    rests = outcome.step_ms[-3:].tolist()
    # The rows of a task stand together, and the one of the first task comes first.
    assert rests == pytest.approx([11 + 0.1 * recomputed, 11, 11])
    assert outcome.recompute_s == pytest.approx(recomputed * 0.1 / 1e3)


@pytest.mark.parametrize("name", [*POLICIES, "oracle"])
@pytest.mark.parametrize("workload", ["shots", "turns"])
@pytest.mark.parametrize("group", [1, 4])
def test_page_accounting_holds_for_every_policy(name: str, workload: str, group: int):
    """Memory is never exceeded, all rows end, and shared pages are those that observations tell."""
    job = named_workload(workload, 60, max_new=100, group=group)
    # The chunk is small, so that prefills are preempted as well.
    machine = Machine(5000, (5, 0.1, 1e-4, 0.05))
    bounds = Bounds(1, 64, 60.0, prefill_tokens=300)
    made: Policy = OraclePolicy(bounds) if name == "oracle" else make_policy(name, bounds)
    policy = Watched(made)
    outcome = simulate(
        job, machine, policy, reveal=name == "oracle", kv_tokens_at=lambda step: 5000 if step % 50 < 40 else 3000
    )
    assert outcome.output_tokens == job.output_tokens.sum()
    assert outcome.total_s > 0.95 * lower_bound_s(job, machine)
    for seen in policy.seen:
        assert seen.kv_tokens_free >= 0
        shared = seen.shared
        assert shared is not None
        own = seen.prompt_tokens + seen.generated_tokens - shared.tokens_per_row(seen.live_rows)
        assert (own >= (seen.generated_tokens > 0)).all()
        live = seen.generated_tokens > 0
        if live.all():
            assert own.sum() + shared.tokens.sum() - seen.live_rows <= seen.kv_tokens_held
            pages = seen.kv_tokens_held - own.sum() - shared.tokens.sum()
            assert pages <= 16 * seen.live_rows + 16 * (seen.prompt_tokens // 16).sum() * (group > 1)


def test_policies_gain_what_beginnings_save():
    """As many rows as memory holds with shared pages counted once, and few preemptions."""
    job = named_workload("shots", 200)
    machine = Machine(8_000, (20, 0.1, 0, 0.1), noise=0.0)
    alone = simulate(replace(job, prefixes=None), machine, make_policy("predictive", Bounds()))
    shared = {name: simulate(job, machine, make_policy(name, Bounds())) for name in ("memory", "predictive")}
    oracle = simulate(job, machine, OraclePolicy(Bounds()), watermark=0.0, reveal=True)
    assert shared["predictive"].rows_mean > 2 * alone.rows_mean
    assert shared["memory"].rows_mean > 2 * alone.rows_mean
    assert shared["predictive"].tokens_per_s > 0.95 * oracle.tokens_per_s
    assert shared["predictive"].recompute_share < 0.02


def test_thrash_is_rare_where_two_tasks_fight_for_tight_memory():
    """Two long beginnings, in turns, of which memory holds both, but few rows beside them."""
    rng = np.random.default_rng(0)
    count = 200
    job = workload_of("two", np.full(count, 2060), rng.geometric(1 / 60, count), 512)
    labels = ["a" if row % 2 else "b" for row in range(count)]
    job = replace(job, prefixes=labelled(labels, np.full(count, 2000)))
    outcome = simulate(job, Machine(5_500, (20, 0.1, 0, 0.1), noise=0.0), make_policy("predictive", Bounds()))
    once = 0.1 * (2 * 2000 + count * 60) / 1e3
    assert outcome.recompute_s < once
    assert outcome.rows_mean > 5


def test_recomputing_counts_what_no_other_row_holds():
    shared = SharedPages(tokens=np.array([160, 32]), rows=np.array([0, 1, 3, 1, 2]), starts=np.array([0, 3]))
    assert recompute_tokens(np.array([200, 200, 100]), shared).tolist() == [40, 8, 68]


def test_the_bound_counts_beginnings_once():
    job = alike([16] * 64, [65] * 64, common=160)
    machine = Machine(1600, (10, 0, 0, 0), noise=0.0)
    own = 64 * (64 * 16 + 64 * 65 // 2)
    assert lower_bound_s(job, machine) == pytest.approx((own + 160 * 64) / 1600 / 100)
    prefill = Machine(10**6, (0, 0, 0, 1), noise=0.0)
    assert lower_bound_s(job, prefill) == pytest.approx((160 + 64 * 16) / 1000)


def test_reordered_rows_keep_their_beginnings():
    job = named_workload("turns", 40)
    order = np.random.default_rng(0).permutation(40)
    taken = job.reordered(order)
    assert taken.prefixes is not None
    assert job.prefixes is not None
    assert taken.prefixes.nodes.tolist() == job.prefixes.nodes[order].tolist()
    assert (job.prefixes.tokens[job.prefixes.nodes] <= job.prompt_tokens).all()
