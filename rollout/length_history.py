"""How long the completions of a prompt were before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from rollout.batcher.types import IntArray
from rollout.records import Record

#: A mean follows what is new: the last completion weighs at least one in so many.
_MEMORY = 32


class LengthHistory:
    """The mean length of a prompt's completions, by a hash of its token ids.

    Args:
        most_prompts: to remember; those that were completed longest ago are forgotten. None: all of them.
    """

    def __init__(self, most_prompts: int | None = None) -> None:
        self._most = most_prompts
        self._known: dict[bytes, tuple[int, float]] = {}
        """Completions seen and their mean, the prompt completed last at the end."""

    def __len__(self) -> int:
        return len(self._known)

    def add(self, prompt_ids: Sequence[int] | IntArray, tokens: int) -> None:
        """A completion of so many tokens."""
        key = _key(prompt_ids)
        count, mean = self._known.pop(key, (0, 0.0))
        count = min(count + 1, _MEMORY)
        self._known[key] = count, mean + (tokens - mean) / count
        if self._most is not None and len(self._known) > self._most:
            del self._known[next(iter(self._known))]

    def learn(self, record: Record) -> None:
        """The same of a record, unless it is an error."""
        if record.finish_reason != "error":
            self.add(record.prompt_ids, len(record.completion_ids))

    def expected(self, prompt_ids: Sequence[int] | IntArray) -> float | None:
        """The mean length of the prompt's completions, None where there were none."""
        known = self._known.get(_key(prompt_ids)) if self._known else None
        return None if known is None else known[1]


def _key(prompt_ids: Sequence[int] | IntArray) -> bytes:
    return hashlib.blake2b(np.asarray(prompt_ids, "<i8").tobytes(), digest_size=16).digest()
