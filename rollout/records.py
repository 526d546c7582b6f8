"""What comes out: one record a (row, sample), and the batch that ``generate`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Record:
    """One completion, or the reason why there is none.

    ``logprobs`` are ``log_softmax(logits / temperature)`` over the full vocabulary in fp32 (raw logits
    when greedy), one a completion token; ``sampler_logprobs`` the same after top-k, top-p and min-p
    renormalisation. ``completion_ids`` keep the end-of-sequence id. ``error_class`` and ``error`` are
    empty unless ``finish_reason`` is ``error``, or a reward function failed (``reward_failed``).
    """

    row_id: str
    sample: int
    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    logprobs: list[float]
    sampler_logprobs: list[float]
    finish_reason: FinishReason
    error_class: str = ""
    error: str = ""
    reward: float | None = None
    seed: int = 0
    weight_version: int = 0
    attempt: int = 0
