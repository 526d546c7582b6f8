"""Process what steps have sampled: store tokens, find where completions end, and make their records."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rollout.batcher.types import FinishedRow, IntArray
from rollout.engine.detokenizer import Detokenizer
from rollout.engine.live_batch import LiveBatch
from rollout.engine.pending_tokens import PendingTokens
from rollout.engine.record_builder import RecordBuilder
from rollout.engine.scheduler import Scheduler
from rollout.engine.waiting_queue import WaitingQueue


class OutputProcessor:
    """Holds the tokens that were sampled and not read yet, and finishes the rows that end with them.

    Args:
        queue: knows all rows that have no record; learns how long completions are.
        records: where records go.
        detokenizer: finds stop strings.
        eos_ids: end-of-sequence ids.
    """

    def __init__(
        self, queue: WaitingQueue, records: RecordBuilder, detokenizer: Detokenizer, eos_ids: Sequence[int]
    ) -> None:
        self._queue = queue
        self._records = records
        self._detokenizer = detokenizer
        self._eos_ids = tuple(eos_ids)
        self.pending: PendingTokens | None = None
        """Sampled tokens that have not been read yet."""
        self.unchecked: IntArray = np.zeros(0, np.int64)
        """Slots whose last received token may end their row; empty but while they are looked at."""
        self._finished: list[FinishedRow] = []

    def take_finished(self) -> list[FinishedRow]:
        """Return the rows that have finished since the last call."""
        taken, self._finished = self._finished, []
        return taken

    def settle(self, scheduler: Scheduler) -> bool:
        """Read the pending tokens and finish the rows that end with them. Return whether any were pending."""
        pending, self.pending = self.pending, None
        if pending is None:
            return False
        live, slots, positions = scheduler.live, pending.slots, pending.positions
        read = pending.read()
        non_finite = ~np.isfinite(read.logprobs)
        # Of a row whose tokens are all banned, only the sampler's log-probability is not finite.
        no_token = np.isnan(read.sampler_logprobs) & ~non_finite
        failed = non_finite | no_token
        if failed.any():
            live.non_finite[slots[non_finite]] = True
            live.no_token[slots[no_token]] = True
        wanted = ~live.ended[slots]
        # Arrays stay as they are where all tokens are wanted, as in most steps.
        kept = slice(None) if wanted.all() else wanted
        self.unchecked = slots[kept]
        live.receive(
            self.unchecked,
            positions[kept],
            tokens=read.tokens[kept],
            logprobs=read.logprobs[kept],
            sampler_logprobs=read.sampler_logprobs[kept],
            weight_version=self._records.weight_version,
        )
        stopped = live.ends_at(slots, read.tokens)
        heeds_eos = ~live.ignore_eos[slots]
        # One id at a time: there are few, and numpy takes longer to reduce [rows, ids].
        for eos_id in self._eos_ids:
            stopped |= (read.tokens == eos_id) & heeds_eos
        stopped &= ~no_token
        for i in (live.has_stops[slots] & wanted & ~(stopped | no_token)).nonzero()[0].tolist():
            stopped[i] = self._hits_stop(live, int(slots[i]))
        ended = stopped | failed | (positions + 1 >= live.limits[slots])
        for i in (wanted & ended).nonzero()[0].tolist():
            self._finish(live, int(slots[i]), bool(stopped[i]))
        self.unchecked = self.unchecked[:0]
        # Other ended rows keep their pages: a step in flight still writes to them, possibly non-finite numbers.
        for slot in slots[live.ended[slots] & (positions + 1 == live.generated[slots])].tolist():
            spoilt = bool(live.non_finite[slot])
            scheduler.leave(slot, scrub=spoilt, keep=not spoilt)
        return True

    def _hits_stop(self, live: LiveBatch, slot: int) -> bool:
        """Return whether the row's text contains one of its stop strings."""
        request = live.row(slot).request
        stops, after = request.params.stop, request.params.min_new_tokens
        return self._detokenizer.ends_at_stop(request.prompt_ids, live.received_tokens(slot), stops, after)

    def _finish(self, live: LiveBatch, slot: int, stopped: bool) -> None:
        """Build the record of a row that ends with its last received token."""
        row, completion = live.row(slot), live.completion(slot)
        if live.non_finite[slot]:
            error = "The model's logits are not finite."
            self._records.fail(row.request, row.sample, completion, error_class="not_finite", error=error)
        elif live.no_token[slot]:
            error = f"The sampling parameters ban every token at position {len(completion)} of the completion."
            self._records.fail(row.request, row.sample, completion, error_class="no_token_allowed", error=error)
        else:
            cut = not stopped and len(completion) >= row.limit
            self._queue.learn(row, len(completion))
            prompt_tokens = len(row.group.prompt_ids)
            self._finished.append(FinishedRow(prompt_tokens=prompt_tokens, output_tokens=len(completion), cut=cut))
            self._records.finish(row.request, row.sample, completion, "stop" if stopped else "length")
        del self._queue.unfinished[row]
        live.end(slot)
