"""Rows that wait: a stream of requests, read no further ahead than needed, and rows that were preempted."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice

import numpy as np

from rollout.batcher.admission_order import Ordering
from rollout.batcher.types import WaitingRows
from rollout.engine.batch_row import BatchRow, Group
from rollout.requests import Request

#: Policies are told of so many waiting rows.
_TOLD = 64


class WaitingQueue:
    """First in, first out, but for what `arrange` does; preempted rows come back to the front, oldest first.

    Args:
        requests: the stream.
        context_limit: most tokens of a row, None when the model has no limit.
        vocabulary: token ids are below this.
        ordering: arranges rows of which something is expected.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        context_limit: int | None,
        vocabulary: int,
        ordering: Ordering | None = None,
    ) -> None:
        self._requests: Iterator[Request] = iter(requests)
        self._context_limit = context_limit
        self._vocabulary = vocabulary
        self._ordering = Ordering() if ordering is None else ordering
        self._rows: deque[BatchRow] = deque()
        self._last_group: Group | None = None
        self._groups = count()
        self._upcoming: WaitingRows | None = None
        self._ended = False
        self._ahead = 0
        """Requests that the stream has at hand."""
        self._has_expectations = self._has_new = False
        self._refused: list[tuple[Request, str, str]] = []
        self.waiting_prompt_tokens = 0
        """Prompt tokens of the rows known to wait, each prompt counted once."""

    def __len__(self) -> int:
        """Rows known to wait."""
        return len(self._rows)

    def __bool__(self) -> bool:
        return bool(self._rows) or not self._ended

    def wants(self, rows: int) -> bool:
        """Whether the stream should be read for ``rows`` rows to be known."""
        return not self._ended and len(self._rows) < rows

    def fill(self, rows: int) -> None:
        """Reads the stream until ``rows`` rows wait and nothing more is at hand, or it ends."""
        while self.wants(rows) or self._ahead:
            request = next(self._requests, None)
            if request is None:
                self._ended, self._ahead = True, 0
            else:
                self._ahead = request.ahead
                self._enter(request)

    def take_refused(self) -> list[tuple[Request, str, str]]:
        """Requests since the last call that cannot run, with error class and message."""
        taken, self._refused = self._refused, []
        return taken

    def _enter(self, request: Request) -> None:
        refusal = self._refusal(request.prompt_ids)
        if refusal is not None:
            self._refused.append((request, *refusal))
            return
        prompt = np.asarray(request.prompt_ids, np.int64)
        if self._last_group is None or not np.array_equal(self._last_group.prompt_ids, prompt):
            self._last_group = Group(next(self._groups), prompt)
        limit = request.params.max_new_tokens
        if self._context_limit is not None:
            limit = min(limit, self._context_limit - len(prompt))
        rows = [BatchRow(request, sample, self._last_group, limit) for sample in request.wanted_samples]
        self._rows.extend(rows)
        self._count(rows)
        self._has_expectations |= request.expected_tokens is not None
        # What comes one by one is not looked at one by one: that would be work at every step.
        self._has_new |= request.ahead > 0

    def _refusal(self, prompt_ids: Sequence[int]) -> tuple[str, str] | None:
        count = len(prompt_ids)
        if count == 0:
            return "empty_prompt", "The prompt has no tokens."
        if self._context_limit is not None and count >= self._context_limit:
            return (
                "prompt_too_long",
                f"The prompt has {count} tokens; the model's context of {self._context_limit} leaves none to generate.",
            )
        if min(prompt_ids) < 0 or max(prompt_ids) >= self._vocabulary:
            return "bad_prompt", f"The prompt has token ids outside of the vocabulary of {self._vocabulary}."
        return None

    # -- order ---------------------------------------------------------------------------------------

    def learn(self, row: BatchRow, tokens: int) -> None:
        """A row has ended with so many tokens."""
        self._ordering.learn(row.expected_tokens, tokens)

    def arrange(self, kv_tokens: int, most_rows: int | None) -> None:
        """Puts rows in order by what is expected of them, if several new ones were at hand or more is known.

        Rows that have tokens, and those whose prompt is in memory, stay in front. Where nothing is expected, nothing
        is done.

        Args:
            kv_tokens: that memory holds.
            most_rows: that live at a time, None when that is not known.
        """
        if not self._has_expectations or not (self._has_new or self._ordering.changed()):
            return
        self._has_new = False
        # By arrival, whatever the order was: it is part of the key.
        rest = sorted((row for row in self._rows if not row.begun), key=lambda row: row.group.number)
        order = self._ordering.order(
            groups=np.array([row.group.number for row in rest], np.int64),
            prompt_tokens=np.array([len(row.group.prompt_ids) for row in rest], np.int64),
            expected_tokens=np.array([row.expected_tokens for row in rest], np.float64),
            kv_tokens=kv_tokens,
            most_rows=math.inf if most_rows is None else most_rows,
        )
        self._rows = deque([row for row in self._rows if row.begun] + [rest[i] for i in order.tolist()])
        self._upcoming = None

    # -- rows ----------------------------------------------------------------------------------------

    def first(self) -> BatchRow | None:
        """The row to be admitted next."""
        return self._rows[0] if self._rows else None

    def pop(self) -> BatchRow:
        """Takes out the row to be admitted next."""
        row = self._rows.popleft()
        self._upcoming = None
        row.group.waiting -= 1
        if not row.group.waiting:
            self.waiting_prompt_tokens -= len(row.group.prompt_ids)
        return row

    def put_back(self, rows: Sequence[BatchRow]) -> None:
        """Preempted rows, oldest first, go before all that wait."""
        self._rows.extendleft(reversed(rows))
        self._count(rows)

    def _count(self, rows: Sequence[BatchRow]) -> None:
        self._upcoming = None
        for row in rows:
            if not row.group.waiting:
                self.waiting_prompt_tokens += len(row.group.prompt_ids)
            row.group.waiting += 1

    def upcoming(self) -> WaitingRows:
        """The rows to be admitted next, as policies are told of them."""
        if self._upcoming is None:
            rows = list(islice(self._rows, _TOLD))
            self._upcoming = WaitingRows(
                prompt_tokens=np.array([len(row.group.prompt_ids) for row in rows], np.int64),
                generated_tokens=np.array([len(row.completion) for row in rows], np.int64),
                max_new_tokens=np.array([row.limit for row in rows], np.int64),
                groups=np.array([row.group.number for row in rows], np.int64),
                ends_at_limit=np.array([row.ends_at_limit for row in rows], np.bool_),
            )
        return self._upcoming

    @property
    def demand(self) -> int:
        """Tokens that the rows known to wait would have at their longest."""
        return sum(len(row.group.prompt_ids) + row.limit for row in self._rows)
