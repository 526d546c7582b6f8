"""What a batching policy sees and what it says: plain values, no torch, no clock, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

OVER_BUDGET = "over_budget"
"""The reason of a decision that cannot keep the budget: the fewest rows allowed already exceed it."""


@dataclass(frozen=True, slots=True)
class StepSample:
    """One finished step: what ran in it and how long it took."""

    rows: int
    """Rows that decoded one token."""
    kv_tokens: int
    """Tokens of context that those rows attended to, summed over rows."""
    prefill_tokens: int
    """Prompt tokens that were prefilled in the same step."""
    ms: float
    """Wall time of the step in milliseconds."""


@dataclass(frozen=True, slots=True)
class FinishedRow:
    """Lengths of a row that ended; policies learn from them."""

    prompt_tokens: int
    output_tokens: int
    cut: bool = False
    """Whether it ended at its ``max_new_tokens``, so that its own length is only known to be no less."""


@dataclass(frozen=True, slots=True)
class WaitingRows:
    """The first rows of the queue, in the order in which they would be admitted; arrays of equal length."""

    prompt_tokens: IntArray
    generated_tokens: IntArray
    """Tokens that a preempted row has kept; they are computed anew before its next one."""
    max_new_tokens: IntArray
    groups: IntArray
    """As in ``Observation.groups``."""
    ends_at_limit: BoolArray
    """As in ``Observation.ends_at_limit``."""

    def __len__(self) -> int:
        return len(self.prompt_tokens)


@dataclass(frozen=True, slots=True)
class Observation:
    """The state of one worker between two steps.

    Arrays have one entry a live row, oldest row first; a row that is still being prefilled is live.
    """

    prompt_tokens: IntArray
    generated_tokens: IntArray
    max_new_tokens: IntArray
    waiting_rows: int
    """Rows known to wait for admission (a stream of prompts may hold more)."""
    waiting_prompt_tokens: int
    """Prompt tokens of those waiting rows, prompts shared by several rows counted once."""
    kv_tokens_held: int
    """Tokens that the memory now in use can hold; shared pages count once."""
    kv_tokens_free: int
    """Tokens that could be held besides: free memory of the pool, and what headroom lets it grow by."""
    headroom_bytes: int
    """Device memory that may still be taken, after the reserve."""
    bytes_per_token: int
    """KV bytes of one token, over all layers; 0 in models that keep recurrent states alone."""
    tokens_per_row: int = 0
    """What a row's recurrent state takes, in tokens; the counts above include it. 0 in models without."""
    page_tokens: int = 1
    """Tokens of a page: memory is taken and given back in so many."""
    groups: IntArray | None = None
    """A number for each live row, equal in rows that share the full pages of their prompt; None: nobody knows."""
    ends_at_limit: BoolArray | None = None
    """Live rows that nothing but ``max_new_tokens`` ends (``ignore_eos``, no stops); None: there are none."""
    waiting: WaitingRows | None = None
    """The next rows to be admitted, as many as are known; None: only the two counts above are."""
    steps: tuple[StepSample, ...] = ()
    """Steps since the last decision."""
    finished: tuple[FinishedRow, ...] = ()
    """Rows that ended since the last decision."""

    @property
    def live_rows(self) -> int:
        return len(self.prompt_tokens)

    @property
    def kv_tokens_total(self) -> int:
        """The paper's eta: all tokens that memory can hold now."""
        return self.kv_tokens_held + self.kv_tokens_free


@dataclass(frozen=True, slots=True)
class Decision:
    """How many rows may live now, how many prompt tokens may be prefilled in the next step, and why."""

    rows: int
    prefill_tokens: int
    reason: str
    """One word, e.g. ``memory``, ``latency``, ``cap``, ``hold``."""
    decode_rows: int | None = None
    """Live rows that decode in the next step, oldest first; the others are paused: they keep what they hold and
    add no token. At least one does. None: all of them."""


class Policy(Protocol):
    """Decides before each step. May keep state of its own, which only observations change."""

    def decide(self, observation: Observation) -> Decision: ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the user allows, whatever the policy: live rows and the budget of a step."""

    min_rows: int = 1
    max_rows: int = 1024
    latency_budget_ms: float | None = None
    prefill_tokens: int = field(default=2048)
    """Most prompt tokens prefilled in one step."""


def decoding_rows(observation: Observation) -> int:
    """Live rows that have at least one token: the paper's N^d."""
    return int(np.count_nonzero(observation.generated_tokens))


def prefilling_rows(observation: Observation) -> int:
    """Rows that wait for admission or for the end of their prefill: the paper's N^p."""
    return observation.waiting_rows + observation.live_rows - decoding_rows(observation)


def within(rows: int, observation: Observation, bounds: Bounds) -> int:
    """``rows`` brought between the bounds, and not below the rows in decode.

    The floor is line 6 of Algorithm 1 and line 15 of Algorithm 2 (arXiv 2503.05248): a policy never sheds
    running work, only the engine's memory gate does. As there, ``max_rows`` goes before the floor.
    """
    return min(max(rows, decoding_rows(observation), bounds.min_rows), bounds.max_rows)
