"""Rows as memory sees them: what each holds alone, and what rows of a prompt hold together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rollout.batcher.types import BoolArray, FloatArray, IntArray, Observation

# For rows of which nothing is known, not even what they may reach.
TYPICAL_MAX_NEW = 256
# Rows that wait have their fellows among the live rows that were admitted last, or after them.
_YOUNGEST = 64


@dataclass(frozen=True, slots=True)
class RowMemory:
    """Arrays with one entry a row."""

    own_tokens: FloatArray
    """What each holds now that no other row does."""
    ages: IntArray
    """Generated tokens."""
    limits: IntArray
    """Most tokens that it may generate."""
    ends_at_limit: BoolArray
    """Whether nothing but the limit ends it."""

    def __len__(self) -> int:
        return len(self.ages)

    @property
    def remaining(self) -> IntArray:
        """Tokens that each may still generate."""
        return self.limits - self.ages

    def taken(self, which: IntArray | BoolArray) -> RowMemory:
        """Some of them."""
        return RowMemory(self.own_tokens[which], self.ages[which], self.limits[which], self.ends_at_limit[which])


@dataclass(frozen=True, slots=True)
class Shared:
    """Prompts that several rows hold together until the last of them ends; arrays with one entry a prompt."""

    tokens: FloatArray
    sizes: IntArray
    """Rows of each."""
    lasts: IntArray
    """The index of the youngest row of each. Rows of a prompt are admitted together, so they stand together."""

    def __len__(self) -> int:
        return len(self.sizes)

    def longest(self, per_row: FloatArray) -> FloatArray:
        """The greatest entry of the rows of each prompt."""
        starts = self.lasts - self.sizes + 1
        return np.maximum.reduceat(per_row, starts) if len(starts) else np.zeros(0)


_NOTHING_SHARED = Shared(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))


def live_rows(observation: Observation) -> tuple[RowMemory, Shared]:
    """The rows that live, and what they share as far as that is told."""
    known = observation.ends_at_limit
    known = np.zeros(observation.live_rows, bool) if known is None else known
    tokens = observation.prompt_tokens + observation.generated_tokens
    shared, own = _NOTHING_SHARED, _held(tokens, observation)
    groups = observation.groups
    if groups is not None and len(groups) > 1 and (alike := groups[1:] == groups[:-1]).any():
        prompts = _full_pages(observation.prompt_tokens, observation)
        own = own - prompts
        lasts = np.flatnonzero(np.append(~alike, True))
        shared = Shared(prompts[lasts].astype(np.float64), np.diff(lasts, prepend=-1), lasts)
    return RowMemory(own, observation.generated_tokens, observation.max_new_tokens, known), shared


def waiting_rows(observation: Observation) -> RowMemory:
    """The rows that wait, first ones first: those that are known, else one that stands for all of them.

    One that joins rows of its prompt, live or before it, does not hold the prompt again.
    """
    waiting = observation.waiting
    if waiting is None:
        if not observation.waiting_rows:
            return RowMemory(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))
        prompt = np.array([observation.waiting_prompt_tokens // observation.waiting_rows])
        limit = int(observation.max_new_tokens.mean()) if observation.live_rows else TYPICAL_MAX_NEW
        return RowMemory(_held(prompt, observation), np.zeros(1, np.int64), np.array([limit]), np.zeros(1, bool))
    joins = np.zeros(len(waiting), bool)
    joins[1:] = waiting.groups[1:] == waiting.groups[:-1]
    if observation.groups is not None:
        joins |= (waiting.groups[:, None] == observation.groups[-_YOUNGEST:]).any(1)
    tokens = waiting.prompt_tokens + waiting.generated_tokens
    own = _held(tokens - np.where(joins, _full_pages(waiting.prompt_tokens, observation), 0), observation)
    return RowMemory(own, waiting.generated_tokens, waiting.max_new_tokens, waiting.ends_at_limit)


def _held(tokens: IntArray, observation: Observation) -> FloatArray:
    """Room for so many tokens, and a row's state: half of a last page is empty on average."""
    besides = observation.tokens_per_row + (observation.page_tokens - 1) / 2
    return tokens.astype(np.float64) + besides


def _full_pages(tokens: IntArray, observation: Observation) -> IntArray:
    return tokens // observation.page_tokens * observation.page_tokens
