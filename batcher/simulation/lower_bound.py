"""Lower bound on the time of a job, for any policy."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from rollout.batcher.simulation.prefixes import Prefixes
from rollout.batcher.simulation.simulator import Machine
from rollout.batcher.simulation.workloads import Workload
from rollout.batcher.types import Bounds, IntArray

# Quantile of the standard normal distribution that 1 % exceed.
_NORMAL_99 = 2.326


def lower_bound_s(
    workload: Workload,
    machine: Machine,
    prefill_tokens: int = Bounds().prefill_tokens,
    budget_ms: float | None = None,
) -> float:
    """Return the fewest seconds that a job takes under any policy, apart from noise.

    Work: each row decodes all its tokens but the first, each token attends to those before it, and each prompt is
    prefilled at least once, what prompts begin with in common only once. Steps: at least the output tokens of the
    longest row; at least the tokens held, summed over decode steps, divided by the size of memory (shared prompt pages
    count once, for the life of the longest row that shares them); at least the prompt tokens divided by
    ``prefill_tokens``, the most per step. With a budget, also the steps needed to do the work in steps so short that
    noise makes 1 % of them exceed the budget (inf if no step is that short). A policy that makes a few steps far longer
    than the budget could be faster than this.
    """
    page = machine.page_tokens
    prompts, decodes = workload.prompt_tokens, workload.output_tokens - 1
    # The first decode step of a row attends to prompt + 1 tokens, and each further one to one token more.
    attended = decodes * prompts + decodes * (decodes + 1) // 2
    _, first, inverse = np.unique(workload.groups, return_index=True, return_inverse=True)
    longest = np.zeros(len(first), np.int64)
    np.maximum.at(longest, inverse, decodes)
    shared = prompts // page * page
    held = (attended - decodes * shared).sum() + (shared[first] * longest).sum()
    prefilled = prompts[first].sum()
    if workload.prefixes is not None:
        common = _common(workload.prefixes, workload.prefixes.nodes[first], longest)
        held -= common.repeated_held
        prefilled -= common.repeated
    steps = max(int(workload.output_tokens.max(initial=0)), held / machine.kv_tokens, prefilled / prefill_tokens)
    c0, c1, c2, c3 = machine.step_ms
    work_ms = c1 * decodes.sum() + c2 * attended.sum() + c3 * prefilled
    if budget_ms is not None:
        longest_step_ms = budget_ms / (1 + _NORMAL_99 * machine.noise)
        steps = max(steps, work_ms / (longest_step_ms - c0)) if longest_step_ms > c0 else math.inf
    return float(c0 * steps + work_ms) / 1e3


class _Common(NamedTuple):
    """Tokens of common beginnings that groups need not compute or hold themselves."""

    repeated: int
    """Tokens, counted for each group but one that begins with them."""
    repeated_held: int
    """The same times decode steps: those of all groups but the one that lives longest."""


def _common(prefixes: Prefixes, nodes: IntArray, longest: IntArray) -> _Common:
    """Count what groups have in common.

    Args:
        prefixes: the tree of beginnings.
        nodes: [groups] node of each group.
        longest: [groups] decode steps of the longest row of each group.
    """
    groups, total, most = (np.zeros(len(prefixes.tokens), np.int64) for _ in range(3))
    paths = prefixes.paths()
    for node, decodes in zip(nodes.tolist(), longest.tolist(), strict=True):
        path = paths[node] if node >= 0 else []
        groups[path] += 1
        total[path] += decodes
        most[path] = np.maximum(most[path], decodes)
    parents = prefixes.parents
    tokens = prefixes.tokens - np.where(parents >= 0, prefixes.tokens[parents], 0)
    return _Common(
        repeated=int((tokens * np.maximum(groups - 1, 0)).sum()), repeated_held=int((tokens * (total - most)).sum())
    )
