"""Input and output of batching policies: plain values, without torch, a clock or I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


OVER_BUDGET = "over_budget"
"""Reason of a decision that cannot keep the latency budget: even the fewest rows allowed exceed it."""

NONE_WAITING = "queue"
"""Reason of a decision that no limit bounds: no further row waits."""


@dataclass(frozen=True, slots=True)
class StepSample:
    """Batch composition and duration of a finished step."""

    rows: int
    """Rows that decoded one token."""
    kv_tokens: int
    """Context tokens that the decoding rows attended to, summed over rows."""
    prefill_tokens: int
    """Prompt tokens prefilled in the same step."""
    ms: float
    """Wall time in milliseconds."""


@dataclass(frozen=True, slots=True)
class FinishedRow:
    """Lengths of a finished row; policies learn from them."""

    prompt_tokens: int
    output_tokens: int
    cut: bool = False
    """True if the row ended at ``max_new_tokens``, so that ``output_tokens`` is a lower bound of its own length."""


@dataclass(frozen=True, slots=True)
class WaitingRows:
    """The first rows of the waiting queue, in admission order; arrays of equal length."""

    prompt_tokens: IntArray
    generated_tokens: IntArray
    """Tokens that a preempted row has already generated; they are recomputed after readmission."""
    max_new_tokens: IntArray
    groups: IntArray
    """As in ``Observation.groups``."""
    ends_at_limit: BoolArray
    """As in ``Observation.ends_at_limit``."""
    shared_tokens: IntArray | None = None
    """[rows] leading prompt tokens, in full pages, that a live row or a row before it in this list holds or will hold,
    so that the row neither computes nor stores them; None: only what ``groups`` tells is known. Pages that no live row
    holds are free memory: they do not count for the first row that will take them."""

    def __len__(self) -> int:
        return len(self.prompt_tokens)


@dataclass(frozen=True, slots=True)
class SharedPages:
    """Pages that several live rows hold, in pieces; all pages of a piece have the same holders.

    ``batcher.shared_pages.find_shared`` makes it from page tables.
    """

    tokens: IntArray
    """[pieces] tokens in the pages of each piece."""
    rows: IntArray
    """[holders of all pieces] indices of live rows: piece by piece, ascending within a piece."""
    starts: IntArray
    """[pieces] where the holders of each piece begin in ``rows``."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def holders(self) -> IntArray:
        """[pieces] number of live rows that hold each piece."""
        counts: IntArray = np.diff(self.starts, append=len(self.rows))
        return counts

    @property
    def repeated_tokens(self) -> int:
        """Tokens that would be held more than once if each row held its own."""
        return int((self.tokens * (self.holders - 1)).sum())

    @property
    def youngest(self) -> IntArray:
        """[pieces] index of the youngest live row that holds each piece."""
        youngest: IntArray = self.rows[np.append(self.starts[1:], len(self.rows))[: len(self)] - 1]
        return youngest

    def max_over_holders(self, per_row: FloatArray) -> FloatArray:
        """[pieces] Return the maximum over the rows that hold each piece."""
        return np.maximum.reduceat(per_row[self.rows], self.starts) if len(self) else np.zeros(0)

    def tokens_per_row(self, rows: int) -> IntArray:
        """[rows] Return the tokens of each live row that other live rows hold too: they stay when the row leaves."""
        return np.bincount(self.rows, np.repeat(self.tokens, self.holders), rows).astype(np.int64)


_NOTHING = np.zeros(0, np.int64)
NO_SHARED_PAGES = SharedPages(tokens=_NOTHING, rows=_NOTHING, starts=_NOTHING)


@dataclass(frozen=True, slots=True)
class Observation:
    """State of one worker between two steps.

    Arrays have one entry per live row, oldest row first. Rows in prefill are live.
    """

    prompt_tokens: IntArray
    generated_tokens: IntArray
    max_new_tokens: IntArray
    waiting_rows: int
    """Rows known to wait for admission (a stream of prompts may hold more)."""
    waiting_prompt_tokens: int
    """Prompt tokens of those waiting rows; a prompt shared by several rows counts once."""
    kv_tokens_held: int
    """Tokens that the memory in use can hold; shared pages count once."""
    kv_tokens_free: int
    """Further tokens that memory can hold: free pages of the pool, pages of prefixes that no live row holds, and the
    pool's possible growth into the headroom."""
    headroom_bytes: int
    """Device memory that may still be allocated, after the reserve."""
    bytes_per_token: int
    """KV bytes per token over all layers; 0 in models with recurrent states only."""
    tokens_per_row: int = 0
    """Size of a row's recurrent state, in tokens, included in the counts above; 0 in models without."""
    page_tokens: int = 1
    """Tokens per page, the unit in which memory is allocated and freed."""
    groups: IntArray | None = None
    """A number per live row, equal for rows that share the full pages of their prompt; None: unknown."""
    ends_at_limit: BoolArray | None = None
    """Live rows that only ``max_new_tokens`` can end (``ignore_eos``, no stop strings); None: no such rows."""
    waiting: WaitingRows | None = None
    """The next rows to be admitted, as far as they are known; None: only the two counts above are known."""
    steps: tuple[StepSample, ...] = ()
    """Steps since the last decision."""
    finished: tuple[FinishedRow, ...] = ()
    """Rows that finished since the last decision."""
    shared: SharedPages | None = None
    """Pages that several live rows hold, those of ``groups`` included; None: only ``groups`` is known."""

    @property
    def live_rows(self) -> int:
        """Number of live rows."""
        return len(self.prompt_tokens)

    @property
    def kv_tokens_total(self) -> int:
        """Tokens that memory can hold in total: eta in arXiv 2503.05248."""
        return self.kv_tokens_held + self.kv_tokens_free


@dataclass(frozen=True, slots=True)
class Decision:
    """Limits of the next step, and their reason."""

    rows: int
    """Most live rows."""
    prefill_tokens: int
    """Most prompt tokens prefilled."""
    reason: str
    """One word, e.g. ``memory``, ``latency``, ``cap``, ``queue``, ``hold``."""
    decode_rows: int | None = None
    """Live rows that decode, oldest first; None: all. The other live rows are paused: they keep their memory and
    add no token. At least one row decodes."""


class Policy(Protocol):
    """Decides before each step. A policy may keep state, but only observations may change it."""

    def decide(self, observation: Observation) -> Decision:
        """Return the limits of the next step."""
        ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits set by the user for every policy."""

    min_rows: int = 1
    """Fewest live rows."""
    max_rows: int = 1024
    """Most live rows."""
    latency_budget_ms: float | None = None
    """Most milliseconds per step; None: no budget."""
    prefill_tokens: int = 2048
    """Most prompt tokens prefilled per step."""


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def decoding_rows(observation: Observation) -> int:
    """Return the number of live rows with at least one token: N^d in arXiv 2503.05248."""
    return int(np.count_nonzero(observation.generated_tokens))


def prefilling_rows(observation: Observation) -> int:
    """Return the number of rows waiting for admission or in prefill: N^p in arXiv 2503.05248."""
    return observation.waiting_rows + observation.live_rows - decoding_rows(observation)


def within(rows: int, observation: Observation, bounds: Bounds) -> int:
    """Clamp ``rows`` to the bounds and to at least the rows in decode.

    The floor is line 6 of Algorithm 1 and line 15 of Algorithm 2 (arXiv 2503.05248): a policy never preempts decoding
    rows, only a lack of memory does. As in the paper, ``max_rows`` takes precedence over the floor.
    """
    return min(max(rows, decoding_rows(observation), bounds.min_rows), bounds.max_rows)
