"""Samples on their way through the engine, before and between their lives in the batch."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rollout.batcher.types import IntArray
from rollout.requests import Request

Float32Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Completion:
    """What a sample has generated so far; arrays of equal length."""

    tokens: IntArray
    logprobs: Float32Array
    sampler_logprobs: Float32Array

    def __len__(self) -> int:
        return len(self.tokens)


NOTHING = Completion(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32))


@dataclass(eq=False, slots=True)
class Group:
    """Rows with the same prompt: the samples of one request, and of equal requests that follow it.

    While any of them lives, the group itself holds the prompt's full pages, for others to join.
    """

    number: int
    """No other group of the queue has it."""
    prompt_ids: IntArray
    pages: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    holders: int = 0
    """Rows of the group that live."""
    waiting: int = 0
    """Rows of the group in the queue."""
    prefill: Prefill | None = None
    """The prefill of the prompt that is under way, which further samples may join."""


@dataclass(eq=False, slots=True)
class BatchRow:
    """One sample of one request."""

    request: Request
    sample: int
    group: Group
    limit: int
    """Most tokens that it may generate: ``max_new_tokens``, or what the context leaves."""
    completion: Completion = NOTHING
    """What it had generated when it was preempted."""

    @property
    def expected_tokens(self) -> float:
        """Tokens that it is expected to generate in all, NaN where nobody knows."""
        expected = self.request.expected_tokens
        return math.nan if expected is None else min(expected, float(self.limit))

    @property
    def ends_at_limit(self) -> bool:
        """Whether nothing but ``limit`` ends it."""
        params = self.request.params
        return params.ignore_eos and not (params.stop or params.stop_token_ids)

    @property
    def begun(self) -> bool:
        """Whether it has tokens, or its prompt is in memory or on its way there."""
        return len(self.completion) > 0 or self.group.holders > 0 or self.group.prefill is not None

    @property
    def context(self) -> IntArray:
        """The tokens whose keys and values it needs before its next token."""
        return np.concatenate([self.group.prompt_ids, self.completion.tokens])


@dataclass(eq=False, slots=True)
class Prefill:
    """A context whose keys and values are being computed, for the rows that will go on from it."""

    group: Group
    context: IntArray
    pages: IntArray
    states: IntArray
    """[rows] the page that each row has for its recurrent state, the first of which is computed; [0] without such."""
    computed: int
    """Tokens whose keys and values are in ``pages`` already."""
    rows: list[BatchRow]

    @property
    def remaining(self) -> int:
        return len(self.context) - self.computed


def noise_key(seed: int, row_id: str) -> tuple[int, int]:
    """Two 32-bit words that stand for (seed, row id); samples and positions go into the counter."""
    digest = hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
