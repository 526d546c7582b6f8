"""Build the observation that a policy decides on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from rollout.batcher.types import FinishedRow, Observation, StepSample, ceil_div
from rollout.engine.kv_memory import KVMemory
from rollout.engine.scheduler import Scheduler
from rollout.engine.waiting_queue import WaitingQueue

_T = TypeVar("_T", bound=np.generic)


def observe(
    scheduler: Scheduler,
    kv: KVMemory,
    queue: WaitingQueue,
    steps: Sequence[StepSample],
    finished: Sequence[FinishedRow],
) -> Observation:
    """Describe the decoding rows, then the rows in prefill, the waiting rows, and memory.

    Args:
        scheduler, kv, queue: their state between two steps.
        steps, finished: steps and finished rows since the last decision.
    """
    live, layout = scheduler.live, kv.pool.layout
    # If only recurrent states take memory, count one byte as a token.
    token_bytes = max(1, layout.bytes_per_token)
    in_prefill = [row for prefill in scheduler.prefills for row in prefill.rows]

    def joined(per_slot: NDArray[_T], prefilling: list[int] | list[bool]) -> NDArray[_T]:
        decoding: NDArray[_T] = per_slot[live.active]
        if not prefilling:
            return decoding
        return np.concatenate([decoding, np.array(prefilling, per_slot.dtype)])

    return Observation(
        prompt_tokens=joined(live.prompt_lengths, [len(row.group.prompt_ids) for row in in_prefill]),
        generated_tokens=joined(live.generated, [len(row.completion) for row in in_prefill]),
        max_new_tokens=joined(live.limits, [row.limit for row in in_prefill]),
        waiting_rows=len(queue),
        waiting_prompt_tokens=queue.waiting_prompt_tokens,
        kv_tokens_held=kv.bytes_used // token_bytes,
        kv_tokens_free=kv.obtainable_bytes // token_bytes,
        headroom_bytes=kv.headroom_bytes,
        bytes_per_token=layout.bytes_per_token,
        tokens_per_row=ceil_div(layout.bytes_per_row, token_bytes),
        page_tokens=layout.page_size,
        # With recurrent states every row computes its own prompt, so rows share nothing.
        groups=None if layout.states else joined(live.groups, [row.group.number for row in in_prefill]),
        ends_at_limit=joined(live.ends_at_limit, [row.ends_at_limit for row in in_prefill]),
        waiting=queue.upcoming(),
        shared=None if layout.states else scheduler.shared_pages(),
        steps=tuple(steps),
        finished=tuple(finished),
    )
