"""Follow a call's stop conditions: what has finished, which prompts have enough, and which samples end before that."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rollout.engine.batch_row import BatchRow
from rollout.engine.tp_sync import SingleProcess
from rollout.records import FinishReason
from rollout.requests import PromptKey, Request
from rollout.stats import Tally
from rollout.stop_conditions import CallProgress, StopConditions, Unfinished


@dataclass(slots=True)
class _Prompt:
    """Samples of a prompt."""

    finished: int
    open: int
    """Samples without a record."""


class EarlyStop:
    """Counts what a call finishes, and says which rows are not to go on.

    Args:
        conditions: of the call.
        reads_all: once the call ends, requests that nobody has read become abort records as well; False: they stay
            unread.
        sync: agrees with the other ranks of a tensor-parallel model.
    """

    def __init__(self, conditions: StopConditions, reads_all: bool, sync: SingleProcess) -> None:
        self._conditions = conditions
        self.reads_all = reads_all
        self._sync = sync
        self._start = time.perf_counter()
        self._prompts: dict[PromptKey, _Prompt] = {}
        """Prompts with open samples."""
        self._finished_samples = 0
        self._finished_prompts = 0
        self._enough: set[PromptKey] = set()
        self._withdrawn: frozenset[tuple[str, int]] = frozenset()
        """Row id and index of the samples that end before the next step."""
        self.call_ends = False
        """Whether a condition of the whole call has held."""

    def watched(self, requests: Iterable[Request | None]) -> Iterator[Request | None]:
        """Yield the requests, whose samples are open from then on."""
        for request in requests:
            if request is None:
                yield None
                continue
            # Samples that are refused stand in a request of their own.
            prompt = self._prompts.setdefault(request.key, _Prompt(finished=request.finished_before, open=0))
            prompt.open += len(request.wanted_samples)
            self._look_at(request.key, prompt)
            yield request

    def count(self, request: Request, reason: FinishReason) -> None:
        """Count a sample that has got its record."""
        prompt = self._prompts[request.key]
        prompt.open -= 1
        if reason in ("stop", "length"):
            prompt.finished += 1
            self._finished_samples += 1
        self._look_at(request.key, prompt)

    def _look_at(self, key: PromptKey, prompt: _Prompt) -> None:
        enough = self._conditions.of_prompt is not None and prompt.finished >= self._conditions.of_prompt
        if enough and key not in self._enough and prompt.open:
            self._enough.add(key)
            self._finished_prompts += 1
        if not prompt.open:
            del self._prompts[key]
            if key in self._enough:
                self._enough.remove(key)
            else:
                self._finished_prompts += 1

    def look(self, tally: Tally, live_rows: int, waiting_rows: int, unfinished: Unfinished) -> bool:
        """Ask the conditions. Return whether `ends` may hold for any row."""
        if not self.call_ends:
            self._ask(tally, live_rows, waiting_rows, unfinished)
        return self.call_ends or bool(self._enough) or bool(self._withdrawn)

    def _ask(self, tally: Tally, live_rows: int, waiting_rows: int, unfinished: Unfinished) -> None:
        conditions = self._conditions
        if not conditions.of_call and conditions.withdrawn is None:
            return
        holds = False
        if conditions.of_call:
            progress = CallProgress(
                seconds=time.perf_counter() - self._start,
                steps=tally.steps,
                sampled_tokens=tally.sampled_tokens,
                finished_samples=self._finished_samples,
                finished_prompts=self._finished_prompts,
                live_rows=live_rows,
                waiting_rows=waiting_rows,
            )
            holds = any(condition(progress) for condition in conditions.of_call)
        withdrawn = frozenset(() if conditions.withdrawn is None else conditions.withdrawn(unfinished))
        # How many samples end. One number says all, since tensor-parallel ranks exchange it at every step.
        ending = self._sync.first_rank_value(math.inf if holds else float(len(withdrawn)))
        self.call_ends = ending == math.inf
        self._withdrawn = self._sync.first_rank_samples(withdrawn) if 0 < ending < math.inf else frozenset()

    def ends(self, row: BatchRow) -> bool:
        """Return whether a row is to be aborted."""
        request = row.request
        return self.call_ends or request.key in self._enough or (request.row_id, row.sample) in self._withdrawn
