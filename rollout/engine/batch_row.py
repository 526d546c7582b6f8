"""Batch rows: samples waiting, in prefill or preempted, and the groups that share a prompt."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rollout.batcher.types import IntArray
from rollout.models.kv_cache.prefix_cache import PendingPages
from rollout.models.kv_cache.prefix_tree import Waiter
from rollout.models.sampling.token_rules import TokenRules
from rollout.requests import Request

Float32Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Completion:
    """Tokens that a sample has generated so far, with their log-probabilities and the versions of the weights.

    Arrays of equal length.
    """

    tokens: IntArray
    logprobs: Float32Array
    sampler_logprobs: Float32Array
    weight_versions: IntArray
    """Version of the weights that each token was drawn with."""

    def __len__(self) -> int:
        return len(self.tokens)


NO_COMPLETION = Completion(
    np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)
)


def completion_before(request: Request, sample: int) -> Completion:
    """Return what a sample had generated before the call."""
    record = request.resumed.get(sample)
    if record is None:
        return NO_COMPLETION
    return Completion(
        tokens=np.array(record.completion_ids, np.int64),
        logprobs=np.array(record.logprobs, np.float32),
        sampler_logprobs=np.array(record.sampler_logprobs, np.float32),
        weight_versions=np.array(record.weight_versions, np.int64),
    )


@dataclass(eq=False, slots=True)
class Group:
    """Rows with the same prompt: the samples of one request, and of requests with an equal prompt right after it.

    Further rows share the prompt's pages, which the prefix cache has.
    """

    number: int
    """Unique within the queue, in order of arrival."""
    prompt_ids: IntArray
    holders: int = 0
    """Rows of the group in the live batch."""
    waiting: int = 0
    """Rows of the group in the queue."""
    prefill: Prefill | None = None
    """The running prefill of the prompt, which further samples may join."""
    follows: int = -1
    """Number of the group behind which it was ordered; -1: none."""
    common_tokens: int = 0
    """Leading prompt tokens, in full pages, that it has in common with that group."""
    waiter: Waiter | None = None
    """Where the prompt stands in the prefix cache while rows wait; None in a model that shares no prefixes."""


@dataclass(eq=False, slots=True)
class BatchRow:
    """One sample of one request."""

    request: Request
    sample: int
    group: Group
    limit: int
    """Maximum tokens to generate: ``max_new_tokens``, or fewer if the context limit is reached first."""
    completion: Completion = NO_COMPLETION
    """Tokens that it had generated when it was preempted, or before the call."""
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
    taken_pages: int = 0
    """Leading pages that other sequences computed."""
    offered: PendingPages | None = None
    """The prompt's pages in the prefix cache; None in a model that shares no prefixes."""

    @property
    def remaining(self) -> int:
        return len(self.context) - self.computed


class PrefillChunk(NamedTuple):
    """The next tokens of one prefill."""

    prefill: Prefill
    tokens: int
    """Tokens to compute, at least one."""


class JoinedRows(NamedTuple):
    """Rows that joined the live batch because their prefill finished; they have no token yet."""

    slots: IntArray
    """[rows] the slot of each row."""
    chunks: IntArray
    """[rows] index of the chunk that finished each row's prefill; the samples of a prompt share one."""


NO_ROWS = JoinedRows(np.zeros(0, np.int64), np.zeros(0, np.int64))


def noise_key(seed: int, row_id: str) -> tuple[int, int]:
    """Hash (seed, row id) to the two 32-bit words of a Philox key; sample and position form the counter."""
    digest = hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
