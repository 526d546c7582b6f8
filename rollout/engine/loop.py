"""The generation loop: each step decides how many rows may live, fits memory, preempts, admits, decodes and retires."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from rollout.batcher.types import OVER_BUDGET, Decision, FinishedRow, IntArray, Observation, Policy, StepSample
from rollout.engine.batch_builder import build_forward_batch
from rollout.engine.batch_row import PrefillChunk
from rollout.engine.detokenizer import Detokenizer
from rollout.engine.kv_memory import KVMemory
from rollout.engine.observation import observe
from rollout.engine.oom_limits import OutOfMemoryLimits
from rollout.engine.pending_tokens import PendingTokens
from rollout.engine.reasoning import ReasoningSplitter
from rollout.engine.record_builder import RecordBuilder
from rollout.engine.scheduler import Scheduler
from rollout.engine.step_reporter import StepReporter, StepResult
from rollout.engine.tp_sync import SingleProcess
from rollout.engine.waiting_queue import WaitingQueue
from rollout.models.arrays import uploaded
from rollout.models.device import is_out_of_memory
from rollout.models.runners.base import Runner
from rollout.models.sampling.sampler import sample
from rollout.records import Record
from rollout.requests import StepReport
from rollout.stats import Tally

logger = logging.getLogger(__name__)

#: Seconds to wait for other processes to free memory on a device that holds none of our rows.
_PATIENCE_S = 60.0
_RETRY_S = 0.05


class Loop:
    """Generates for the rows of a queue: call `refill` and `advance` until `advance` returns None, then `close`.

    Args:
        runner: runs the model on the pages of ``kv``.
        kv: the KV pages and the memory they may grow into.
        policy: decides how many rows may live.
        queue: waiting rows.
        detokenizer: decodes completions and finds stop strings.
        eos_ids: end-of-sequence ids.
        reasoning: tells reasoning from text; None: all is text.
        weight_version: stamped on records.
        on_step: called with a report of every step.
        overlap: read each step's tokens one step later, so the device never waits for the host; None means: on a GPU.
            Records are the same. A row that ends at a stop or end-of-sequence token runs one step more, and the token
            of that step is discarded; steps and sampled tokens count it.
        sync: agrees with the other ranks of a tensor-parallel model.
    """

    def __init__(
        self,
        runner: Runner,
        kv: KVMemory,
        policy: Policy,
        queue: WaitingQueue,
        detokenizer: Detokenizer,
        eos_ids: Sequence[int],
        reasoning: ReasoningSplitter | None = None,
        weight_version: int = 0,
        on_step: Callable[[StepReport], None] | None = None,
        overlap: bool | None = None,
        sync: SingleProcess | None = None,
    ) -> None:
        self._runner = runner
        self._kv = kv
        self._policy = policy
        self._queue = queue
        self._detokenizer = detokenizer
        self._eos_ids = np.array(eos_ids, np.int64)
        self._overlap = kv.pool.device.type == "cuda" if overlap is None else overlap
        self._sync = sync or SingleProcess()
        self.tally = Tally()
        self._reporter = StepReporter(tally=self.tally, kv=kv, queue=queue, on_step=on_step)
        self._records = RecordBuilder(
            detokenizer=detokenizer, tally=self.tally, weight_version=weight_version, reasoning=reasoning
        )
        self._scheduler = Scheduler(kv=kv, queue=queue, tally=self.tally, settle=self._settle)
        self._pending: PendingTokens | None = None
        """Sampled tokens that have not been read yet."""
        self._steps: list[StepSample] = []
        self._finished: list[FinishedRow] = []
        self._row_target: int | None = None
        self._limits = OutOfMemoryLimits()
        self._stuck_since: float | None = None
        self._warned_over_budget = False

    # -- the loop ------------------------------------------------------------------------------------

    def refill(self) -> None:
        """Read as many requests as the next steps may admit, order the waiting rows, and reject invalid requests."""
        self._queue.fill(self._lookahead)
        token_bytes = max(1, self._kv.pool.layout.bytes_per_token)
        capacity = (self._kv.bytes_used + self._kv.obtainable_bytes) // token_bytes
        self._queue.arrange(kv_tokens=capacity, most_rows=self._row_target)
        for rejected in self._queue.take_rejected():
            self._records.reject(rejected.request, rejected.error_class, rejected.error)

    def advance(self) -> list[Record] | None:
        """Step until records are finished or more requests should be read; return None when all work is done."""
        while self._queue or self._scheduler.alive:
            if self._records or self._queue.wants(self._lookahead):
                return self._records.take()
            self._guarded_step()
        return self._records.take() or None

    def _step(self) -> StepResult:
        """Decide, fit memory, preempt, admit, run one forward over prefill and decode, and retire finished rows."""
        scheduler = self._scheduler
        observation, decision = self._decide()
        scheduler.shrink(self._kv.excess_bytes)
        scheduler.preempt_beyond(decision.rows)
        missing_pages = scheduler.admit(decision.rows, decision.prefill_tokens)
        live_rows = scheduler.alive
        slots = scheduler.make_room(decision.decode_rows)
        paused = len(scheduler.live) - len(slots)
        chunks = scheduler.prefill_chunks(self._limits.prefill_tokens(decision.prefill_tokens))
        ran = self._prefill_and_decode(slots, chunks)
        return StepResult(
            observation=observation,
            decision=decision,
            live_rows=live_rows,
            paused_rows=paused,
            sample=ran,
            missing_pages=missing_pages,
        )

    def _guarded_step(self) -> None:
        """Run and report one step; on an allocator failure, back off instead."""
        start, tokens_before = time.perf_counter(), self.tally.sampled_tokens
        try:
            step = self._step()
        except (RuntimeError, MemoryError) as error:
            # The other ranks are blocked in this forward's collectives and cannot be interrupted.
            if not is_out_of_memory(error) or not self._sync.alone:
                raise
            self._back_off()
            return
        finally:
            if self.tally.sampled_tokens > tokens_before:
                self._stuck_since = None
        if step.missing_pages is not None:
            self._wait_or_give_up(step.missing_pages)
        self._limits.relax()
        step_ms = self._sync.first_rank_value(1e3 * (time.perf_counter() - start))
        timed = replace(step.sample, ms=step_ms)
        self._steps.append(timed)
        self._reporter.report(replace(step, sample=timed))

    def close(self) -> None:
        """Drop all rows and free all memory."""
        self._pending = None
        self._scheduler.close()
        self._runner.close()

    @property
    def _lookahead(self) -> int:
        """Waiting rows to read: those that may be admitted next, and one more to know whether any is waiting.

        Reading no further leaves the rest of the dataset to other workers.
        """
        if self._row_target is None:
            return 1
        kv, live_rows = self._kv, self._scheduler.alive
        smallest_row = kv.pool.layout.bytes_per_page + kv.pool.layout.bytes_per_row
        mean_row = kv.bytes_used / max(1, live_rows)
        fitting = int(kv.obtainable_bytes / max(smallest_row, mean_row))
        return 1 + min(max(0, self._row_target - live_rows), fitting)

    # -- deciding ------------------------------------------------------------------------------------

    def _decide(self) -> tuple[Observation, Decision]:
        start = time.perf_counter()
        self._kv.read_headroom(self._runner.bytes_kept)
        if self._kv.must_evict and self._runner.shed():
            self._kv.read_headroom(self._runner.bytes_kept)
        observation = self._observe()
        decision = self._limits.apply(self._policy.decide(observation))
        if decision.rows != self._row_target:
            change = (self.tally.steps, self._row_target, decision.rows, decision.reason)
            logger.debug("step %d: row target %s -> %d: %s", *change)
            self._row_target = decision.rows
            self.tally.target_changes += 1
        if decision.reason == OVER_BUDGET and not self._warned_over_budget:
            self._warned_over_budget = True
            logger.warning("Even a step of %d sample(s) exceeds the latency budget; continuing so.", decision.rows)
        self.tally.deciding_seconds += time.perf_counter() - start
        return observation, decision

    def _observe(self) -> Observation:
        observation = observe(
            scheduler=self._scheduler, kv=self._kv, queue=self._queue, steps=self._steps, finished=self._finished
        )
        self._steps.clear()
        self._finished.clear()
        return observation

    # -- computing -----------------------------------------------------------------------------------

    def _prefill_and_decode(self, slots: IntArray, chunks: Sequence[PrefillChunk]) -> StepSample:
        """Run one forward over ``slots`` and ``chunks``, sample, and settle the tokens of the previous step."""
        batch = build_forward_batch(self._scheduler.live, slots, chunks, layout=self._kv.pool.layout)
        if batch is None:
            self._settle()
            return StepSample(rows=0, kv_tokens=0, prefill_tokens=0, ms=0.0)
        logits = self._runner.forward(batch)
        rows = len(slots)
        joined = self._scheduler.finish_chunks(chunks)
        if len(joined.slots):
            slots = np.concatenate([slots, joined.slots])
        pending = None
        if len(slots):
            # Sequences of the batch: one per decoding slot, then one per chunk.
            sequences = np.concatenate([np.arange(rows), rows + joined.chunks])
            pending = self._sample(slots, logits[uploaded(sequences, logits.device)] if chunks else logits)
        self._settle()
        self._pending = pending
        if not (self._overlap and self._scheduler.alive):
            self._settle()
        prefilled = int(batch.query_lens[rows:].sum())
        self.tally.prefilled_tokens += prefilled
        return StepSample(rows=rows, kv_tokens=int(batch.seq_lens[:rows].sum()), prefill_tokens=prefilled, ms=0.0)

    def _sample(self, slots: IntArray, logits: torch.Tensor) -> PendingTokens:
        """Sample one token per slot from its row of ``logits``, without waiting for the device."""
        live = self._scheduler.live
        positions = live.generated[slots]
        sampled = self._sync.first_rank_tokens(sample(logits, live.sampling(slots), uploaded(positions, logits.device)))
        pending = PendingTokens.of(slots, positions, sampled)
        live.advance(slots, sampled.tokens)
        self.tally.sampled_tokens += len(slots)
        return pending

    def _settle(self) -> bool:
        """Read the pending tokens and finish the rows that end with them. Return whether any were pending."""
        pending, self._pending = self._pending, None
        if pending is None:
            return False
        live, slots, positions = self._scheduler.live, pending.slots, pending.positions
        read = pending.read()
        live.non_finite[slots] |= ~np.isfinite(read.logprobs)
        # Of a row whose tokens are all banned, only the sampler's log-probability is not finite.
        live.no_token[slots] = np.isnan(read.sampler_logprobs) & ~live.non_finite[slots]
        wanted = ~live.ended[slots]
        live.receive(
            slots[wanted],
            positions[wanted],
            tokens=read.tokens[wanted],
            logprobs=read.logprobs[wanted],
            sampler_logprobs=read.sampler_logprobs[wanted],
        )
        stopped = np.isin(read.tokens, self._eos_ids) & ~live.ignore_eos[slots] | live.ends_at(slots, read.tokens)
        stopped &= ~live.no_token[slots]
        for i in np.flatnonzero(live.has_stops[slots] & wanted & ~(stopped | live.no_token[slots])).tolist():
            stopped[i] = self._hits_stop(int(slots[i]))
        ended = stopped | live.non_finite[slots] | live.no_token[slots] | (positions + 1 >= live.limits[slots])
        for i in np.flatnonzero(wanted & ended).tolist():
            self._finish(int(slots[i]), bool(stopped[i]))
        # Other ended rows keep their pages: a step in flight still writes to them, possibly non-finite numbers.
        for slot in slots[live.ended[slots] & (positions + 1 == live.generated[slots])].tolist():
            self._scheduler.leave(slot, scrub=bool(live.non_finite[slot]))
        return True

    def _hits_stop(self, slot: int) -> bool:
        """Return whether the row's text contains one of its stop strings."""
        live = self._scheduler.live
        request = live.row(slot).request
        stops, after = request.params.stop, request.params.min_new_tokens
        return self._detokenizer.ends_at_stop(request.prompt_ids, live.received_tokens(slot), stops, after)

    def _finish(self, slot: int, stopped: bool) -> None:
        """Build the record of a row that ends with its last received token."""
        live = self._scheduler.live
        row, completion = live.row(slot), live.completion(slot)
        live.end(slot)
        if live.non_finite[slot]:
            error = "The model's logits are not finite."
            self._records.fail(row.request, row.sample, completion, error_class="not_finite", error=error)
            return
        if live.no_token[slot]:
            error = f"The sampling parameters ban every token at position {len(completion)} of the completion."
            self._records.fail(row.request, row.sample, completion, error_class="no_token_allowed", error=error)
            return
        cut = not stopped and len(completion) >= row.limit
        self._queue.learn(row, len(completion))
        prompt_tokens = len(row.group.prompt_ids)
        self._finished.append(FinishedRow(prompt_tokens=prompt_tokens, output_tokens=len(completion), cut=cut))
        self._records.finish(row.request, row.sample, completion, "stop" if stopped else "length")

    # -- when memory runs out ------------------------------------------------------------------------

    def _back_off(self) -> None:
        """Recover from an allocator failure: fewer rows, then smaller prefills, then waiting with the only row."""
        scheduler = self._scheduler
        alive = scheduler.alive  # counted before rows end or are preempted below
        self._settle()
        self.tally.out_of_memory_events += 1
        # Rows of the failed step that have no token yet; youngest first, as each goes to the front of the queue.
        for slot in scheduler.live.without_token()[::-1].tolist():
            scheduler.preempt(slot)
        logger.warning("Out of memory with %d samples at the same time; continuing with fewer.", alive)
        longest = 0 if scheduler.recurrent else max((prefill.remaining for prefill in scheduler.prefills), default=0)
        if alive > 1:
            scheduler.preempt_beyond(self._limits.halve_rows(alive))
        elif not self._limits.halve_prefill(longest):
            scheduler.preempt_youngest()
        if scheduler.recurrent:  # a state may already include the token that its row would decode from again
            for slot in scheduler.live.active[::-1].tolist():
                scheduler.preempt(slot)
        scheduler.drop_free_slabs()
        self._runner.shed()
        self._kv.release_cached()
        if not scheduler.alive and len(self._queue):
            self._wait_or_give_up(self._kv.pool.layout.pages_for(1))

    def _wait_or_give_up(self, pages: int) -> None:
        """Wait for memory for the next row, which needs ``pages``; give it up if it can never fit or waited too long.

        Called when the device holds no row of ours. Other processes may free memory; patience is `_PATIENCE_S` without
        a sampled token.
        """
        now = self._sync.first_rank_value(time.monotonic())
        self._stuck_since = self._stuck_since or now
        states = 1 if self._scheduler.recurrent else 0
        if self._kv.could_hold(pages, states) and now - self._stuck_since < _PATIENCE_S:
            time.sleep(_RETRY_S)
            return
        self._stuck_since = None
        row = self._queue.pop()
        error = f"A sample of more than {len(row.context)} tokens does not fit into {self._kv.bound}, even alone."
        self._records.fail(row.request, row.sample, row.completion, error_class="too_large", error=error)
