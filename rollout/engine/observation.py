"""What the loop tells a policy before each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from rollout.batcher.types import FinishedRow, Observation, StepSample
from rollout.engine.kv_memory import KVMemory
from rollout.engine.scheduler import Scheduler
from rollout.engine.waiting_queue import WaitingQueue

_T = TypeVar("_T", bound=np.generic)


def observe(
    running: Scheduler,
    memory: KVMemory,
    queue: WaitingQueue,
    steps: Sequence[StepSample],
    finished: Sequence[FinishedRow],
) -> Observation:
    """Describe live rows, those that are prefilled after them, what waits, and memory.

    Args:
        running, memory, queue: as they are between two steps.
        steps, finished: since the last decision.
    """
    live, layout = running.live, memory.pool.layout
    # Where tokens take nothing, one byte stands for a token, and rows for very many.
    unit = max(1, layout.bytes_per_token)
    starting = [row for prefill in running.prefills for row in prefill.rows]

    def joined(decoding: NDArray[_T], others: list[int] | list[bool]) -> NDArray[_T]:
        some: NDArray[_T] = decoding[live.active]
        return np.concatenate([some, np.array(others, decoding.dtype)]) if others else some

    return Observation(
        prompt_tokens=joined(live.prompt_lengths, [len(row.group.prompt_ids) for row in starting]),
        generated_tokens=joined(live.generated, [len(row.completion) for row in starting]),
        max_new_tokens=joined(live.limits, [row.limit for row in starting]),
        waiting_rows=len(queue),
        waiting_prompt_tokens=queue.waiting_prompt_tokens,
        kv_tokens_held=memory.bytes_used // unit,
        kv_tokens_free=memory.obtainable_bytes // unit,
        headroom_bytes=memory.headroom_bytes,
        bytes_per_token=layout.bytes_per_token,
        tokens_per_row=-(-layout.bytes_per_row // unit),
        page_tokens=layout.page_size,
        # Where states make each row compute its prompt by itself, little is shared.
        groups=None if layout.states else joined(live.groups, [row.group.number for row in starting]),
        ends_at_limit=joined(live.ends_at_limit, [row.ends_at_limit for row in starting]),
        waiting=queue.upcoming(),
        steps=tuple(steps),
        finished=tuple(finished),
    )
