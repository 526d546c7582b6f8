"""Memory held by each row, and by pages that several rows share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rollout.batcher.types import NO_SHARED_PAGES, BoolArray, FloatArray, IntArray, Observation, SharedPages

TYPICAL_MAX_NEW = 256
"""Assumed ``max_new_tokens`` where no row is known."""
# A waiting row can only share its prompt with recently admitted live rows, because a group is admitted together.
_YOUNGEST_ROWS = 64


@dataclass(frozen=True, slots=True)
class RowMemory:
    """Memory and age of rows; arrays with one entry per row."""

    own_tokens: FloatArray
    """Tokens that no other row shares, held now."""
    ages: IntArray
    """Generated tokens."""
    limits: IntArray
    """Most tokens that the row may generate."""
    ends_at_limit: BoolArray
    """True where only the limit ends the row."""

    def __len__(self) -> int:
        return len(self.ages)

    @property
    def remaining(self) -> IntArray:
        """Tokens that each row may still generate."""
        return self.limits - self.ages

    def select(self, rows: IntArray | BoolArray) -> RowMemory:
        """Return the rows at these indices, or where this mask is True."""
        return RowMemory(
            own_tokens=self.own_tokens[rows],
            ages=self.ages[rows],
            limits=self.limits[rows],
            ends_at_limit=self.ends_at_limit[rows],
        )


_NO_ROWS = RowMemory(
    own_tokens=np.zeros(0), ages=np.zeros(0, np.int64), limits=np.zeros(0, np.int64), ends_at_limit=np.zeros(0, bool)
)


def live_rows(observation: Observation) -> tuple[RowMemory, SharedPages]:
    """Return the live rows, and the pages that several of them hold, as far as the observation tells.

    Where only ``groups`` tells, the prompt of each group is a piece, even if a single row holds it.
    """
    ends_at_limit = observation.ends_at_limit
    if ends_at_limit is None:
        ends_at_limit = np.zeros(observation.live_rows, bool)
    tokens = observation.prompt_tokens + observation.generated_tokens
    shared, own_tokens = NO_SHARED_PAGES, _tokens_held(tokens, observation)
    groups = observation.groups
    if observation.shared is not None:
        shared = observation.shared
        if len(shared):
            own_tokens = own_tokens - shared.tokens_per_row(observation.live_rows)
    elif groups is not None and (groups[1:] == groups[:-1]).any():
        prompts = _full_page_tokens(observation.prompt_tokens, observation)
        own_tokens = own_tokens - prompts
        # Rows of a group are adjacent, because they are admitted together.
        starts = np.flatnonzero(np.append(True, groups[1:] != groups[:-1]))
        shared = SharedPages(tokens=prompts[starts], rows=np.arange(len(groups)), starts=starts)
    rows = RowMemory(
        own_tokens=own_tokens,
        ages=observation.generated_tokens,
        limits=observation.max_new_tokens,
        ends_at_limit=ends_at_limit,
    )
    return rows, shared


def waiting_rows(observation: Observation) -> RowMemory:
    """Return the known waiting rows in admission order, or one average row if only their number is known.

    A row whose prompt, or the beginning of it, is held by a live row or by a waiting row before it holds only the rest.
    """
    waiting = observation.waiting
    if waiting is None:
        return _average_waiting_row(observation)
    shares_prompt = np.zeros(len(waiting), bool)
    shares_prompt[1:] = waiting.groups[1:] == waiting.groups[:-1]
    if observation.groups is not None:
        shares_prompt |= (waiting.groups[:, None] == observation.groups[-_YOUNGEST_ROWS:]).any(1)
    tokens = waiting.prompt_tokens + waiting.generated_tokens
    shared = np.where(shares_prompt, _full_page_tokens(waiting.prompt_tokens, observation), 0)
    if waiting.shared_tokens is not None:
        shared = np.maximum(shared, waiting.shared_tokens)
    return RowMemory(
        own_tokens=_tokens_held(tokens - shared, observation),
        ages=waiting.generated_tokens,
        limits=waiting.max_new_tokens,
        ends_at_limit=waiting.ends_at_limit,
    )


def _average_waiting_row(observation: Observation) -> RowMemory:
    if not observation.waiting_rows:
        return _NO_ROWS
    prompt = np.array([observation.waiting_prompt_tokens // observation.waiting_rows])
    limit = int(observation.max_new_tokens.mean()) if observation.live_rows else TYPICAL_MAX_NEW
    return RowMemory(
        own_tokens=_tokens_held(prompt, observation),
        ages=np.zeros(1, np.int64),
        limits=np.array([limit]),
        ends_at_limit=np.zeros(1, bool),
    )


def _tokens_held(tokens: IntArray, observation: Observation) -> FloatArray:
    """Add the recurrent state and the unused half of the last page, on average, to the tokens of each row."""
    return tokens.astype(np.float64) + (observation.tokens_per_row + (observation.page_tokens - 1) / 2)


def _full_page_tokens(tokens: IntArray, observation: Observation) -> IntArray:
    return tokens // observation.page_tokens * observation.page_tokens
