"""The waiting queue: preempted rows, and the rows of a request stream that is read only as far as needed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice, pairwise
from typing import NamedTuple, Protocol

import numpy as np

from rollout.batcher.admission_order import Ordering
from rollout.batcher.types import IntArray, WaitingRows
from rollout.engine.alike_prompts import alike_order
from rollout.engine.batch_row import BatchRow, Group, completion_before
from rollout.errors import InputError
from rollout.models.sampling.token_rules import TokenRules
from rollout.requests import Request
from rollout.sampling_params import SamplingParams

#: Waiting rows that an observation lists.
_OBSERVED_ROWS = 64
#: Steps after which a stream that had no request is asked again. Counted, so that tensor-parallel ranks agree.
_STEPS_BETWEEN_LOOKS = 8


class RejectedRequest(NamedTuple):
    """A request that cannot run."""

    request: Request
    error_class: str
    error: str


class PromptWatcher(Protocol):
    """Told of the prompts that rows wait with; knows which of their pages are in memory."""

    @property
    def page_tokens(self) -> int:
        """Tokens per page."""
        ...

    @property
    def changes(self) -> int:
        """Counts up whenever `held_tokens` may have changed."""
        ...

    def held_tokens(self, groups: Sequence[Group]) -> IntArray:
        """Return [groups] the leading tokens of prompts that rows wait with, in full pages, which live rows hold."""
        ...

    def waits(self, group: Group) -> None:
        """Note that the first row of the group waits."""
        ...

    def waits_no_more(self, group: Group) -> None:
        """Note that no row of the group waits any more."""
        ...


class WaitingQueue:
    """First in, first out, except as `arrange` reorders; preempted rows return to the front, oldest first.

    Args:
        requests: the stream; None in it says that there is no request at this time, and more may come.
        context_limit: maximum tokens of prompt and completion together; None: no limit.
        vocab_size: token ids must be below this.
        ordering: orders rows by their expected lengths.
        compile_rules: compiles a request's parameters and the ids that end it; raises InputError if they do not suit
            the model.
    """

    def __init__(
        self,
        requests: Iterable[Request | None],
        context_limit: int | None,
        vocab_size: int,
        ordering: Ordering | None = None,
        compile_rules: Callable[[SamplingParams, Sequence[int]], TokenRules | None] = lambda *_: None,
    ) -> None:
        self._requests: Iterator[Request | None] = iter(requests)
        self._context_limit = context_limit
        self._vocab_size = vocab_size
        self._ordering = Ordering() if ordering is None else ordering
        self._compile_rules = compile_rules
        self._rows: deque[BatchRow] = deque()
        self._last_group: Group | None = None
        self._groups = count()
        self._upcoming: WaitingRows | None = None
        self._upcoming_groups: list[Group] = []
        self._counted_at = -1
        """Changes of the watcher when the upcoming rows' shared tokens were counted."""
        self._ended = False
        self._steps_to_look = 0
        """Steps before the stream, which had no request, is asked again."""
        self._ahead = 0
        """Requests that can be read without waiting."""
        self._has_expectations = False
        self._has_new = False
        """Whether several requests arrived together since the last reordering."""
        self._rejected: list[RejectedRequest] = []
        self._watcher: PromptWatcher | None = None
        self.unfinished: dict[BatchRow, None] = {}
        """All rows read that have no record yet, wherever they are, in order of arrival."""
        self.waiting_prompt_tokens = 0
        """Prompt tokens of the waiting rows read so far, each prompt counted once."""

    def __len__(self) -> int:
        """Return the number of waiting rows read so far."""
        return len(self._rows)

    def __bool__(self) -> bool:
        return bool(self._rows) or not self._ended

    @property
    def reads_on(self) -> bool:
        """Whether the stream may have another request at this time."""
        return not self._ended and not self._steps_to_look

    def wants(self, rows: int) -> bool:
        """Return whether the stream must be read on for ``rows`` rows to be waiting."""
        return self.reads_on and len(self._rows) < rows

    def fill(self, rows: int) -> None:
        """Read requests until ``rows`` rows are waiting and the current window is drained, or the stream ends."""
        while self.wants(rows) or self._ahead:
            try:
                request = next(self._requests)
            except StopIteration:
                self.stop_reading()
                break
            if request is None:
                self._steps_to_look = _STEPS_BETWEEN_LOOKS
                self._ahead = 0
            else:
                self._ahead = request.ahead
                self._add(request)

    def count_step(self, *, idle: bool) -> None:
        """Count a step that is to run; ask the stream again if nothing is left to compute."""
        self._steps_to_look = 0 if idle else max(0, self._steps_to_look - 1)

    def take_rejected(self) -> list[RejectedRequest]:
        """Return the requests rejected since the last call."""
        taken, self._rejected = self._rejected, []
        return taken

    def _add(self, request: Request) -> None:
        rejected = self._rejection(request)
        if rejected is not None:
            self._rejected.append(rejected)
            return
        try:
            rules = self._compile_rules(request.params, request.end_ids)
        except InputError as error:
            self._rejected.append(RejectedRequest(request, "bad_params", str(error)))
            return
        prompt = np.asarray(request.prompt_ids, np.int64)
        if self._last_group is None or not np.array_equal(self._last_group.prompt_ids, prompt):
            self._last_group = Group(next(self._groups), prompt)
        limit = request.params.max_new_tokens
        if self._context_limit is not None:
            limit = min(limit, self._context_limit - len(prompt))
        rows = [
            BatchRow(
                request=request,
                sample=sample,
                group=self._last_group,
                limit=limit,
                completion=completion_before(request, sample),
                rules=rules,
            )
            for sample in request.wanted_samples
        ]
        self.unfinished.update(dict.fromkeys(rows))
        self._rows.extend(rows)
        self._count(rows)
        self._has_expectations |= request.expected_tokens is not None
        # Requests that arrive singly do not trigger a reordering, which would then run at every step.
        self._has_new |= request.ahead > 0

    def _rejection(self, request: Request) -> RejectedRequest | None:
        if request.error_class:
            return RejectedRequest(request, request.error_class, request.error)
        prompt_ids, count = request.prompt_ids, len(request.prompt_ids)
        if count == 0:
            return RejectedRequest(request, "empty_prompt", "The prompt has no tokens.")
        if self._context_limit is not None and count >= self._context_limit:
            error = (
                f"The prompt has {count} tokens; the model's context of {self._context_limit} leaves none to generate."
            )
            return RejectedRequest(request, "prompt_too_long", error)
        if min(prompt_ids) < 0 or max(prompt_ids) >= self._vocab_size:
            error = f"The prompt has token ids outside of the vocabulary of {self._vocab_size}."
            # Records hold ids of 32 bits.
            return RejectedRequest(replace(request, prompt_ids=()), "bad_prompt", error)
        return None

    # -- order ---------------------------------------------------------------------------------------

    def learn(self, row: BatchRow, tokens: int) -> None:
        """Learn from a row that ended with ``tokens`` tokens how good the expectations are."""
        self._ordering.learn(row.expected_tokens, tokens)

    def arrange(self, kv_tokens: int, most_rows: int | None) -> None:
        """Reorder the rows if several requests arrived together or the expectations changed.

        The order is that of expected lengths, or without any, that of arrival with prompts that begin alike together.
        Rows that have tokens, and those whose prompt is in memory, stay in front.

        Args:
            kv_tokens: tokens that fit into memory.
            most_rows: maximum rows alive at a time; None: unknown.
        """
        has_new, self._has_new = self._has_new, False
        if not self._has_expectations:
            if has_new and self._watcher is not None:
                self._put_alike_together(self._watcher.page_tokens)
            return
        if not (has_new or self._ordering.changed()):
            return
        not_begun = self._not_begun()
        order = self._ordering.order(
            groups=np.array([row.group.number for row in not_begun], np.int64),
            prompt_tokens=np.array([len(row.group.prompt_ids) for row in not_begun], np.int64),
            expected_tokens=np.array([row.expected_tokens for row in not_begun], np.float64),
            kv_tokens=kv_tokens,
            most_rows=math.inf if most_rows is None else most_rows,
        )
        self._rows = deque([row for row in self._rows if row.begun] + [not_begun[i] for i in order.tolist()])
        self._upcoming = None

    def _put_alike_together(self, page_tokens: int) -> None:
        rows: dict[Group, list[BatchRow]] = {}
        for row in self._not_begun():
            rows.setdefault(row.group, []).append(row)
        groups = list(rows)
        order, common = alike_order([group.prompt_ids for group in groups], page_tokens)
        for before, after, tokens in zip([-1, *order], order, common, strict=False):
            groups[after].follows = -1 if before < 0 else groups[before].number
            groups[after].common_tokens = tokens
        self._rows = deque([row for row in self._rows if row.begun])
        self._rows.extend(row for index in order for row in rows[groups[index]])
        self._upcoming = None

    def _not_begun(self) -> list[BatchRow]:
        """Return the rows whose order is free, in order of arrival."""
        return sorted((row for row in self._rows if not row.begun), key=lambda row: row.group.number)

    # -- rows ----------------------------------------------------------------------------------------

    def row(self, place: int) -> BatchRow | None:
        """Return the row before which ``place`` others wait, or None."""
        return self._rows[place] if place < len(self._rows) else None

    def pop(self, place: int = 0) -> BatchRow:
        """Remove and return the row before which ``place`` others wait."""
        row = self._rows[place]
        del self._rows[place]
        self._uncount([row])
        return row

    def watch(self, watcher: PromptWatcher | None) -> None:
        """Tell ``watcher``, and none before it, of the prompts that rows wait with, now and from now on."""
        self._watcher = watcher
        self._upcoming = None
        for group in dict.fromkeys(row.group for row in self._rows):
            group.waiter = None
            if watcher is not None:
                watcher.waits(group)

    def withdraw(self, unwanted: Callable[[BatchRow], bool]) -> list[BatchRow]:
        """Remove and return the waiting rows that are unwanted."""
        rows = [row for row in self._rows if unwanted(row)]
        if rows:
            self._rows = deque(row for row in self._rows if not unwanted(row))
            self._uncount(rows)
        return rows

    def stop_reading(self) -> None:
        """Leave the rest of the requests unread."""
        self._ended = True
        self._ahead = 0

    def put_back(self, rows: Sequence[BatchRow]) -> None:
        """Put preempted rows, oldest first, before all waiting rows."""
        self._rows.extendleft(reversed(rows))
        self._count(rows)

    def _count(self, rows: Sequence[BatchRow]) -> None:
        self._upcoming = None
        for row in rows:
            if not row.group.waiting:
                self.waiting_prompt_tokens += len(row.group.prompt_ids)
                if self._watcher is not None:
                    self._watcher.waits(row.group)
            row.group.waiting += 1

    def _uncount(self, rows: Sequence[BatchRow]) -> None:
        self._upcoming = None
        for row in rows:
            row.group.waiting -= 1
            if not row.group.waiting:
                self.waiting_prompt_tokens -= len(row.group.prompt_ids)
                if self._watcher is not None:
                    self._watcher.waits_no_more(row.group)

    def upcoming(self) -> WaitingRows:
        """Return the next rows to admit, as an observation lists them."""
        watcher = self._watcher
        if self._upcoming is None:
            rows = list(islice(self._rows, _OBSERVED_ROWS))
            self._upcoming = WaitingRows(
                prompt_tokens=np.array([len(row.group.prompt_ids) for row in rows], np.int64),
                generated_tokens=np.array([len(row.completion) for row in rows], np.int64),
                max_new_tokens=np.array([row.limit for row in rows], np.int64),
                groups=np.array([row.group.number for row in rows], np.int64),
                ends_at_limit=np.array([row.ends_at_limit for row in rows], np.bool_),
            )
            self._upcoming_groups = [row.group for row in rows]
            self._counted_at = -1
        if watcher is not None and watcher.changes != self._counted_at:
            self._counted_at = watcher.changes
            self._upcoming = replace(self._upcoming, shared_tokens=self._shared_tokens(watcher))
        return self._upcoming

    def _shared_tokens(self, watcher: PromptWatcher) -> IntArray:
        """Return `WaitingRows.shared_tokens` of the upcoming rows."""
        groups, page = self._upcoming_groups, watcher.page_tokens
        before = np.zeros(len(groups), np.int64)
        for i, (one, group) in enumerate(pairwise(groups), 1):
            if group is one:
                before[i] = len(group.prompt_ids) // page * page
            elif group.follows == one.number:
                before[i] = group.common_tokens
        return np.maximum(before, watcher.held_tokens(groups))

    @property
    def max_tokens(self) -> int:
        """Tokens of the waiting rows if each reaches its limit."""
        return sum(len(row.group.prompt_ids) + row.limit for row in self._rows)
