"""Times that no policy can beat."""

from __future__ import annotations

import math

import numpy as np

from rollout.batcher.simulation.simulator import Machine
from rollout.batcher.simulation.workloads import Workload
from rollout.batcher.types import Bounds

# 1 % of normal deviates are beyond.
_ONE_PERCENT = 2.326


def lower_bound_s(
    workload: Workload,
    machine: Machine,
    prefill_tokens: int = Bounds().prefill_tokens,
    budget_ms: float | None = None,
) -> float:
    """Seconds that the job takes at least, whatever is known and whoever decides, but for the noise of steps.

    Work: each row decodes all its tokens but the first, each attends to what is before it, each prompt is prefilled
    at least once. Steps: as many as the longest row has tokens; as the tokens held, summed over decode steps, fill
    memory (pages of a prompt that rows share count once, for as long as the longest of its rows); and as the prompts
    fill prefills of ``prefill_tokens``, the most in a step. With a budget also as many as it takes to do the work in
    steps so long that the noise takes 1 % of them over it (inf if there are none); a few far beyond it could do more.
    """
    page = machine.page_tokens
    prompts, decodes = workload.prompt_tokens, workload.output_tokens - 1
    # A decode step attends to prompt + 1 tokens the first time, and to one more each time.
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
    work = c1 * decodes.sum() + c2 * attended.sum() + c3 * prompts[first].sum()
    if budget_ms is not None:
        full = budget_ms / (1 + _ONE_PERCENT * machine.noise)
        steps = max(steps, work / (full - c0)) if full > c0 else math.inf
    return float(c0 * steps + work) / 1e3
