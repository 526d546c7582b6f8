"""What goes in: one prompt, tokenised, with all that its samples depend on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from rollout.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and the samples wanted of it.

    A sample's noise depends on ``seed``, ``row_id``, its index and the position alone.
    """

    row_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    seed: int = 0
    samples: Sequence[int] | None = None
    """Which samples to draw; all ``params.n`` of them when None. A resumed job asks for the missing ones."""
    expected_tokens: float | None = None
    """How long its completions are expected to be; None: nobody knows. Nothing but the order of work depends on it."""
    ahead: int = 0
    """How many of the requests that follow are at hand, so that they may be read at once and put in another order."""

    @property
    def wanted_samples(self) -> Sequence[int]:
        return range(self.params.n) if self.samples is None else self.samples


def in_windows(requests: Iterable[Request], size: int) -> Iterator[Request]:
    """The same requests, up to ``size`` of them read at a time and marked as at hand together."""
    rest = iter(requests)
    while window := list(islice(rest, size)):
        for number, request in enumerate(window, 1):
            yield replace(request, ahead=len(window) - number)


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step of the engine as seen from outside: what metrics and progress lines are made of."""

    step: int
    live_rows: int
    paused_rows: int
    """Of these, rows that could decode and did not."""
    waiting_rows: int
    row_target: int
    reason: str
    kv_tokens: int
    kv_bytes: int
    headroom_bytes: int
    prefill_tokens: int
    new_tokens: int
    preempted_rows: int
    """Since the last report, as the next."""
    out_of_memory_events: int
    step_ms: float
