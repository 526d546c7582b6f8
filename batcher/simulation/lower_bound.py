"""Lower bound on the time of a job, for any policy."""

from __future__ import annotations

import math

import numpy as np

from rollout.batcher.simulation.simulator import Machine
from rollout.batcher.simulation.workloads import Workload
from rollout.batcher.types import Bounds

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
    prefilled at least once. Steps: at least the output tokens of the longest row; at least the tokens held, summed
    over decode steps, divided by the size of memory (shared prompt pages count once, for the life of the longest row
    of the group); at least the prompt tokens divided by ``prefill_tokens``, the most per step. With a budget, also
    the steps needed to do the work in steps so short that noise makes 1 % of them exceed the budget (inf if no step
    is that short). A policy that makes a few steps far longer than the budget could be faster than this.
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
    steps = max(
        int(workload.output_tokens.max(initial=0)),
        held / machine.kv_tokens,
        prompts[first].sum() / prefill_tokens,
    )
    c0, c1, c2, c3 = machine.step_ms
    work_ms = c1 * decodes.sum() + c2 * attended.sum() + c3 * prompts[first].sum()
    if budget_ms is not None:
        longest_step_ms = budget_ms / (1 + _NORMAL_99 * machine.noise)
        steps = max(steps, work_ms / (longest_step_ms - c0)) if longest_step_ms > c0 else math.inf
    return float(c0 * steps + work_ms) / 1e3
