"""Mean completion length of each prompt seen so far."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rollout.batcher.types import IntArray
from rollout.records import Record

#: The newest completion weighs at least 1/32 of the mean, so the mean follows a changing policy.
_MEAN_WINDOW = 32


class _Mean(NamedTuple):
    completions: int
    """Completions averaged, at most `_MEAN_WINDOW`."""
    tokens: float
    """Mean completion length."""


class LengthHistory:
    """Mean length of each prompt's completions, keyed by a hash of its token ids.

    Args:
        most_prompts: prompts to remember; the least recently completed are forgotten first. None: no limit.
    """

    def __init__(self, most_prompts: int | None = None) -> None:
        self._most_prompts = most_prompts
        self._known: dict[bytes, _Mean] = {}
        """Keyed by prompt hash; the most recently completed prompt comes last."""

    def __len__(self) -> int:
        return len(self._known)

    def add(self, prompt_ids: Sequence[int] | IntArray, tokens: int) -> None:
        """Add a completion of ``tokens`` tokens."""
        key = _key(prompt_ids)
        known = self._known.pop(key, _Mean(completions=0, tokens=0.0))
        count = min(known.completions + 1, _MEAN_WINDOW)
        self._known[key] = _Mean(completions=count, tokens=known.tokens + (tokens - known.tokens) / count)
        if self._most_prompts is not None and len(self._known) > self._most_prompts:
            del self._known[next(iter(self._known))]

    def learn(self, record: Record) -> None:
        """Add a record's completion if it has finished: an error or an abort says little about lengths."""
        if record.finished:
            self.add(record.prompt_ids, len(record.completion_ids))

    def expected(self, prompt_ids: Sequence[int] | IntArray) -> float | None:
        """Return the mean length of the prompt's completions, or None before the first one."""
        known = self._known.get(_key(prompt_ids)) if self._known else None
        return None if known is None else known.tokens


def _key(prompt_ids: Sequence[int] | IntArray) -> bytes:
    return hashlib.blake2b(np.asarray(prompt_ids, "<i8").tobytes(), digest_size=16).digest()
