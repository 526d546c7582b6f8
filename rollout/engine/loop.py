"""The generation loop: each step decides how many rows may live, fits memory, preempts, admits, decodes and retires."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch

from rollout.batcher.types import OVER_BUDGET, Decision, IntArray, Observation, Policy, StepSample
from rollout.engine.aborts import Aborts
from rollout.engine.batch_builder import build_forward_batch
from rollout.engine.batch_row import PrefillChunk
from rollout.engine.detokenizer import Detokenizer
from rollout.engine.early_stop import EarlyStop
from rollout.engine.kv_memory import KVMemory
from rollout.engine.observation import observe
from rollout.engine.oom_limits import OutOfMemoryLimits
from rollout.engine.output_processor import OutputProcessor
from rollout.engine.pending_tokens import PendingTokens
from rollout.engine.reasoning import ReasoningSplitter
from rollout.engine.record_builder import RecordBuilder
from rollout.engine.scheduler import Scheduler
from rollout.engine.step_reporter import ForwardSize, StepReporter, StepResult
from rollout.engine.tp_sync import SingleProcess
from rollout.engine.waiting_queue import WaitingQueue
from rollout.models.arrays import uploaded
from rollout.models.device import is_out_of_memory
from rollout.models.module.signals import deliver_signals
from rollout.models.runners.base import Runner
from rollout.models.sampling.sampler import sample
from rollout.records import Record
from rollout.requests import Request, StepReport
from rollout.stats import Tally

logger = logging.getLogger(__name__)

#: Seconds to wait for other processes to free memory on a device that holds none of our rows.
_PATIENCE_S = 60.0
_RETRY_S = 0.05
#: Rows that are read at a time once the call ends early.
_ABORTED_TOGETHER = 1 << 10


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
        weight_version: stamped on tokens.
        on_step: called with a report of every step.
        on_record: called with every record and its request.
        overlap: read each step's tokens one step later, so the device never waits for the host; None means: on a GPU.
            Records are the same. A row that ends at a stop or end-of-sequence token runs one step more, and the token
            of that step is discarded; steps and sampled tokens count it.
        sync: agrees with the other ranks of a tensor-parallel model.
        early_stop: says which rows are to be aborted; None: none.
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
        on_record: Callable[[Request, Record], None] | None = None,
        overlap: bool | None = None,
        sync: SingleProcess | None = None,
        early_stop: EarlyStop | None = None,
    ) -> None:
        self._runner = runner
        self._kv = kv
        self._policy = policy
        self._queue = queue
        self._overlap = kv.pool.device.type == "cuda" if overlap is None else overlap
        self._sync = sync or SingleProcess()
        self.tally = Tally()
        self._reporter = StepReporter(tally=self.tally, kv=kv, queue=queue, on_step=on_step)
        self._records = RecordBuilder(
            detokenizer=detokenizer,
            tally=self.tally,
            weight_version=weight_version,
            reasoning=reasoning,
            counted=None if early_stop is None else early_stop.count,
            on_record=on_record,
        )
        self._early_stop = early_stop
        self._outputs = OutputProcessor(queue, self._records, detokenizer, eos_ids)
        self._scheduler = self._scheduler_on(kv)
        self._aborts = Aborts(queue, self._records, self.tally, early_stop)
        self._steps: list[StepSample] = []
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
            self._aborts.unwanted(self._scheduler, self._settle)
            self._queue.count_step(idle=not (self._scheduler.alive or len(self._queue)))
            if self._records or (self._queue.reads_on and self._queue.wants(self._lookahead)):
                return self._records.take()
            deliver_signals()
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
            ran=ran,
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
        timed = step.ran.timed(step_ms)
        if not self._runner.prepared:  # reported as slow as it was, but no policy can avoid it by fewer rows
            self._steps.append(timed)
        self._reporter.report(step, timed)

    @property
    def runner(self) -> Runner:
        """The runner in use."""
        return self._runner

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next step runs with."""
        return self._records.weight_version

    def use_weights(self, version: int, *, changed: bool) -> None:
        """Stamp the tokens of further steps with a version of the weights.

        Args:
            version: of the weights that the next step runs with.
            changed: whether they differ from those of earlier steps. Then all rows return to the queue with their
                tokens, so that keys and values, also of shared prompts, are computed anew.
        """
        self._settle()  # tokens that are still to be read were drawn with the earlier weights
        if changed:
            self._scheduler.preempt_beyond(0)
            self._kv.cache.clear()
        self._records.weight_version = version

    def abandon(self) -> list[Record]:
        """Return the records that nobody has taken, and abort records of all other rows; then `close`."""
        return self._aborts.everything(self._scheduler.live, self._outputs.unchecked)

    def move(self, runner: Runner, kv: KVMemory) -> None:
        """Go on with another runner and other pages, once `use_weights` has returned all rows to the queue."""
        self._scheduler.close()
        self._runner.close()
        self._runner, self._kv = runner, kv
        self._reporter.kv = kv
        self._scheduler = self._scheduler_on(kv)

    def _scheduler_on(self, kv: KVMemory) -> Scheduler:
        # A cycle of references would keep the module and the copies of its weights until Python collects garbage.
        loop = weakref.proxy(self)
        return Scheduler(kv=kv, queue=self._queue, tally=self.tally, settle=lambda: loop._settle())

    def close(self, *, resting: bool = False) -> None:
        """Drop all rows and free all memory, but for what a session keeps, which takes over a resting ``runner``."""
        self._outputs.pending = None
        self._scheduler.close()
        if not resting:
            self._runner.close()

    @property
    def _lookahead(self) -> int:
        """Waiting rows to read: those that may be admitted next, and one more to know whether any is waiting.

        Reading no further leaves the rest of the dataset to other workers.
        """
        if self._early_stop is not None and self._early_stop.call_ends:
            return _ABORTED_TOGETHER
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
        steps, self._steps = self._steps, []
        finished = self._outputs.take_finished()
        return observe(scheduler=self._scheduler, kv=self._kv, queue=self._queue, steps=steps, finished=finished)

    # -- computing -----------------------------------------------------------------------------------

    def _prefill_and_decode(self, slots: IntArray, chunks: Sequence[PrefillChunk]) -> ForwardSize:
        """Run one forward over ``slots`` and ``chunks``, sample, and settle the tokens of the previous step."""
        batch = build_forward_batch(self._scheduler.live, slots, chunks, layout=self._kv.pool.layout)
        if batch is None:
            self._settle()
            return ForwardSize(rows=0, kv_tokens=0, prefill_tokens=0)
        logits = self._runner.forward(batch)
        rows, live = len(slots), self._scheduler.live
        joined = self._scheduler.finish_chunks(chunks)
        if len(joined.slots):
            # The array itself where all decode, as in `Scheduler.make_room`.
            together = rows + len(joined.slots) == len(live)
            slots = live.active if together else np.concatenate([slots, joined.slots])
        pending = None
        if len(slots):
            # Sequences of the batch: one per decoding slot, then one per chunk, mostly of one row each.
            if not np.array_equal(joined.chunks, np.arange(len(chunks))):
                sequences = np.concatenate([np.arange(rows), rows + joined.chunks])
                logits = logits[uploaded(sequences, logits.device)]
            pending = self._sample(slots, logits)
        self._settle()
        self._outputs.pending = pending
        if not (self._overlap and self._scheduler.alive):
            self._settle()
        prefilled = sum(chunk.tokens for chunk in chunks)
        self.tally.prefilled_tokens += prefilled
        # A row that decodes attends to its prefix and its new token.
        attended = int(batch.prefix_lens[:rows].sum()) + rows
        return ForwardSize(rows=rows, kv_tokens=attended, prefill_tokens=prefilled)

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
        return self._outputs.settle(self._scheduler)

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
        self._kv.cache.clear()
        self._kv.release_idle()
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
        del self._queue.unfinished[row]
