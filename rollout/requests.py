"""Requests that enter the engine, and the reports of its steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

from rollout.batcher.types import Observation
from rollout.records import Record
from rollout.sampling_params import SamplingParams


class PromptKey(NamedTuple):
    """Names a prompt in a call; the samples' noise depends on it."""

    seed: int
    row_id: str


@dataclass(frozen=True, slots=True)
class Request:
    """One tokenised prompt and the samples wanted of it.

    The sampling noise of a token depends only on ``seed``, ``row_id``, the sample's index and the token's position.
    """

    row_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    seed: int = 0
    samples: Sequence[int] | None = None
    """Indices of the samples to generate; None: all ``params.n``. A resumed job asks for the missing ones."""
    expected_tokens: float | None = None
    """Expected length of a completion, None if unknown. Affects only the order of admission."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """What the caller gave beside the prompt; stands in the records."""
    error_class: str = ""
    error: str = ""
    """Why the prompt cannot be used; it becomes error records."""
    end_ids: Sequence[int] = ()
    """Token ids that end a completion, besides the model's end-of-sequence ids and those of ``params``."""
    ahead: int = 0
    """Number of following requests that can be read without waiting, so that they may be reordered together."""
    resumed: Mapping[int, Record] = field(default_factory=dict)
    """Records that samples continue, by sample."""
    finished_before: int = 0
    """Samples of the prompt that had finished before the call."""

    @property
    def key(self) -> PromptKey:
        return PromptKey(self.seed, self.row_id)

    @property
    def wanted_samples(self) -> Sequence[int]:
        return range(self.params.n) if self.samples is None else self.samples


def turn_ends(turn_end_ids: Sequence[int], params: SamplingParams) -> Sequence[int]:
    """Return the ids that end a chat's turn, or none if the parameters say so."""
    return turn_end_ids if params.stop_at_turn_end and not params.ignore_eos else ()


def in_windows(requests: Iterable[Request], size: int) -> Iterator[Request]:
    """Yield the requests unchanged but for ``ahead``, reading up to ``size`` of them at a time."""
    rest = iter(requests)
    while window := list(islice(rest, size)):
        for number, request in enumerate(window, 1):
            yield replace(request, ahead=len(window) - number)


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step of the engine, as reported to metrics and progress lines. Rows are batch rows."""

    step: int
    live_rows: int
    paused_rows: int
    """Live rows that could decode but were paused in this step."""
    waiting_rows: int
    row_target: int
    reason: str
    kv_tokens: int
    kv_bytes: int
    headroom_bytes: int
    prefill_tokens: int
    new_tokens: int
    preempted_rows: int
    """Rows preempted since the previous report."""
    out_of_memory_events: int
    """Allocator failures since the previous report."""
    step_ms: float
    observation: Observation
    """What the step was decided on."""
