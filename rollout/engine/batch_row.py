"""Batch rows: samples waiting, in prefill or preempted, and the groups that share a prompt."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rollout.batcher.types import IntArray
from rollout.models.sampling.token_rules import TokenRules
from rollout.requests import Request

Float32Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Completion:
    """Tokens that a sample has generated so far, with their log-probabilities; arrays of equal length."""

    tokens: IntArray
    logprobs: Float32Array
    sampler_logprobs: Float32Array

    def __len__(self) -> int:
        return len(self.tokens)


NO_COMPLETION = Completion(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32))


@dataclass(eq=False, slots=True)
class Group:
    """Rows with the same prompt: the samples of one request, and of requests with an equal prompt right after it.

    While any of its rows is live, the group holds a reference to the prompt's full pages, for further rows to share.
    """

    number: int
    """Unique within the queue, in order of arrival."""
    prompt_ids: IntArray
    pages: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    holders: int = 0
    """Rows of the group in the live batch."""
    waiting: int = 0
    """Rows of the group in the queue."""
    prefill: Prefill | None = None
    """The running prefill of the prompt, which further samples may join."""


@dataclass(eq=False, slots=True)
class BatchRow:
    """One sample of one request."""

    request: Request
    sample: int
    group: Group
    limit: int
    """Maximum tokens to generate: ``max_new_tokens``, or fewer if the context limit is reached first."""
    completion: Completion = NO_COMPLETION
    """Tokens that it had generated when it was preempted."""
    rules: TokenRules | None = None
    """What its parameters do to its logits before temperature and filters; None: nothing."""

    @property
    def expected_tokens(self) -> float:
        """Expected length of the completion, NaN if unknown."""
        expected = self.request.expected_tokens
        return math.nan if expected is None else min(expected, float(self.limit))

    @property
    def ends_at_limit(self) -> bool:
        """Whether only ``limit`` can end the row."""
        params = self.request.params
        return params.ignore_eos and not (params.stop or params.stop_token_ids or self.request.end_ids)

    @property
    def begun(self) -> bool:
        """Whether the row has tokens, or its prompt is in memory or in prefill."""
        return len(self.completion) > 0 or self.group.holders > 0 or self.group.prefill is not None

    @property
    def context(self) -> IntArray:
        """Tokens whose keys and values must be computed before the next token."""
        return np.concatenate([self.group.prompt_ids, self.completion.tokens])


@dataclass(eq=False, slots=True)
class Prefill:
    """A context being prefilled, and the rows that will decode from it."""

    group: Group
    context: IntArray
    pages: IntArray
    states: IntArray
    """[rows] page of each row's recurrent state; the prefill computes the first. [0] in models without."""
    computed: int
    """Tokens whose keys and values are already in ``pages``."""
    rows: list[BatchRow]

    @property
    def remaining(self) -> int:
        return len(self.context) - self.computed


class PrefillChunk(NamedTuple):
    """The next tokens of one prefill."""

    prefill: Prefill
    tokens: int
    """Tokens to compute, at least one."""


def noise_key(seed: int, row_id: str) -> tuple[int, int]:
    """Hash (seed, row id) to the two 32-bit words of a Philox key; sample and position form the counter."""
    digest = hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
