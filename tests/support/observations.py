"""Observations for policy tests, with everything that a test does not care about filled in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rollout.batcher.types import FinishedRow, IntArray, Observation, StepSample


def observe(
    generated: Sequence[int] = (),
    *,
    prompt: int = 100,
    max_new: int = 512,
    waiting: int = 1000,
    eta: int = 1 << 40,
    steps: Sequence[StepSample] = (),
    finished: Sequence[FinishedRow] = (),
    tokens_per_row: int = 0,
) -> Observation:
    """Live rows with ``generated`` tokens each, and memory for ``eta`` tokens in all."""

    def filled(value: int) -> IntArray:
        return np.full(len(generated), value, dtype=np.int64)

    held = min(eta, sum(generated) + prompt * len(generated))
    return Observation(
        prompt_tokens=filled(prompt),
        generated_tokens=np.array(generated, dtype=np.int64),
        max_new_tokens=filled(max_new),
        waiting_rows=waiting,
        waiting_prompt_tokens=waiting * prompt,
        kv_tokens_held=held,
        kv_tokens_free=eta - held,
        headroom_bytes=eta - held,
        bytes_per_token=1,
        tokens_per_row=tokens_per_row,
        steps=tuple(steps),
        finished=tuple(finished),
    )


def step(rows: int, ms: float, prefill_tokens: int = 0) -> StepSample:
    return StepSample(rows=rows, kv_tokens=rows, prefill_tokens=prefill_tokens, ms=ms)
