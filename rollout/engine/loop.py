"""The generation loop: each step decides how many rows may live, fits memory, admits, decodes and retires."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from rollout.batcher.types import Decision, FinishedRow, IntArray, Observation, Policy, StepSample
from rollout.engine.detokenizer import Detokenizer
from rollout.engine.kv_memory import KVMemory
from rollout.engine.observation import observe
from rollout.engine.pending_tokens import PendingTokens
from rollout.engine.record_builder import RecordBuilder
from rollout.engine.scheduler import Scheduler
from rollout.engine.tp_sync import SingleProcess
from rollout.engine.waiting_queue import WaitingQueue
from rollout.models.arrays import uploaded
from rollout.models.device import is_out_of_memory
from rollout.models.runners.base import Runner
from rollout.models.sampling.sampler import sample
from rollout.records import Record
from rollout.requests import StepReport
from rollout.stats import Tally

logger = logging.getLogger("rollout.batcher")

#: Steps without an allocator failure after which the cap that one had set is doubled.
_CALM_STEPS = 256
#: How long an empty device may be squeezed by others before the next row is given up.
_PATIENCE_S = 60.0
_RETRY_S = 0.05


class Loop:
    """Generates for the rows of a queue. Call `refill` and `advance` until that returns None, then `close`.

    Args:
        runner, memory: the model on its pages.
        policy: decides how many rows may live.
        text: detokenises and finds stop strings.
        eos: end-of-sequence ids.
        queue: rows that wait.
        weight_version: stamped on records.
        on_step: told of every step.
        overlap: whether the tokens of a step are read only when the next one is on its way, so that the device need not
            wait for the host; None where that is a GPU. Records are the same. A row that ends with a token that nobody
            could foresee takes part in one step too many, whose token is dropped: steps and drawn tokens count it.
        together: who decides.
    """

    def __init__(
        self,
        runner: Runner,
        memory: KVMemory,
        policy: Policy,
        text: Detokenizer,
        eos: Sequence[int],
        queue: WaitingQueue,
        weight_version: int = 0,
        on_step: Callable[[StepReport], None] | None = None,
        overlap: bool | None = None,
        together: SingleProcess | None = None,
    ) -> None:
        self._runner, self._memory, self._policy, self._text, self._queue = runner, memory, policy, text, queue
        self._eos = np.array(eos, np.int64)
        self._on_step = on_step
        self._sync = together or SingleProcess()
        self.tally = Tally()
        self._record_builder = RecordBuilder(text, self.tally, weight_version)
        self._scheduler = Scheduler(memory, queue, self.tally, self._settle)
        self._overlap = memory.pool.device.type == "cuda" if overlap is None else overlap
        self._pending: PendingTokens | None = None
        """What the last step drew, if that was not read yet."""
        self._steps: list[StepSample] = []
        self._finished: list[FinishedRow] = []
        self._target: int | None = None
        self._reason = ""
        self._oom_rows: int | None = None
        self._oom_prefill: int | None = None
        self._calm = 0
        self._stuck_since: float | None = None
        self._told_over_budget = False
        self._told = (0, 0, 0)
        """Drawn tokens, preempted rows and allocator failures when the last step was reported."""

    # -- the loop ------------------------------------------------------------------------------------

    def refill(self) -> None:
        """Reads on in the stream of requests, as far as the next steps may admit, and puts what waits in order."""
        self._queue.fill(self._lookahead)
        memory = self._memory
        unit = max(1, memory.pool.layout.bytes_per_token)
        self._queue.arrange((memory.bytes_used + memory.obtainable_bytes) // unit, self._target)
        for request, error_class, error in self._queue.take_refused():
            self._record_builder.refuse(request, error_class, error)

    def advance(self) -> list[Record] | None:
        """Steps until records are finished or the stream should be read on; None when all is done."""
        while self._queue or self._scheduler.alive:
            if self._record_builder or self._queue.wants(self._lookahead):
                return self._record_builder.take()
            self._step()
        return self._record_builder.take() or None

    def _step(self) -> None:
        started, running, tokens = time.perf_counter(), self._scheduler, self.tally.drawn_tokens
        try:
            decision = self._decide()
            running.shrink(self._memory.excess_bytes)
            running.preempt_beyond(decision.rows)
            lacking = running.admit(decision.rows, decision.prefill_tokens)
            alive = running.alive
            done, paused = self._forward(decision)
        except (RuntimeError, MemoryError) as error:
            # The others wait in the middle of the forward for this one's part of it, and cannot be told.
            if not is_out_of_memory(error) or not self._sync.alone:
                raise
            self._back_off()
            return
        finally:
            if self.tally.drawn_tokens > tokens:
                self._stuck_since = None
        if lacking is not None:
            self._wait_or_give_up(lacking)
        self._calm_down()
        step_ms = self._sync.measured(1e3 * (time.perf_counter() - started))
        self._account(decision, replace(done, ms=step_ms), alive, paused)

    def close(self) -> None:
        """Drops all rows and gives all memory back."""
        self._pending = None
        self._scheduler.close()
        self._runner.close()

    @property
    def _lookahead(self) -> int:
        """How many waiting rows must be known: those that may be admitted next, and one to see that any wait.

        No more are read, so that a worker leaves to others what it has no room for.
        """
        if self._target is None:
            return 1
        memory, layout = self._memory, self._memory.pool.layout
        least = layout.bytes_per_page + layout.bytes_per_row
        fitting = int(memory.obtainable_bytes / max(least, memory.bytes_used / max(1, self._scheduler.alive)))
        return 1 + min(max(0, self._target - self._scheduler.alive), fitting)

    # -- deciding ------------------------------------------------------------------------------------

    def _decide(self) -> Decision:
        started = time.perf_counter()
        self._memory.read(self._runner.bytes_kept)
        if self._memory.wants_rows_back and self._runner.shed():
            self._memory.read(self._runner.bytes_kept)
        decision = self._policy.decide(self._observe())
        if self._oom_rows is not None and self._oom_rows < decision.rows:
            decision = replace(decision, rows=self._oom_rows, reason="oom")
        if decision.rows != self._target:
            # A policy may change its mind with each row that ends; why, it changes seldom.
            level = logging.DEBUG if decision.reason == self._reason else logging.INFO
            change = (self.tally.steps, self._target, decision.rows, decision.reason)
            logger.log(level, "step %d: row target %s -> %d: %s", *change)
            self._target, self._reason = decision.rows, decision.reason
            self.tally.target_changes += 1
        if decision.reason == "over_budget" and not self._told_over_budget:
            self._told_over_budget = True
            logger.warning("A step of %d row(s) takes longer than the latency budget; going on so.", decision.rows)
        self.tally.deciding_seconds += time.perf_counter() - started
        return decision

    def _observe(self) -> Observation:
        observation = observe(self._scheduler, self._memory, self._queue, self._steps, self._finished)
        self._steps.clear()
        self._finished.clear()
        return observation

    # -- computing -----------------------------------------------------------------------------------

    def _forward(self, decision: Decision) -> tuple[StepSample, int]:
        """One token for every live row that is not paused and the next part of the oldest prefills, in one forward.

        Only when that is on its way are the tokens of the step before read.

        Returns what ran, its time left open, and the rows that were paused.
        """
        running, prefill_tokens = self._scheduler, decision.prefill_tokens
        slots = running.make_room(decision.decode_rows)
        parts = running.prefill_parts(
            prefill_tokens if self._oom_prefill is None else min(prefill_tokens, self._oom_prefill)
        )
        packed = running.packed(slots, parts)
        if packed is None:
            self._settle()
            return StepSample(0, 0, 0, 0.0), 0
        logits = self._runner.forward(packed)
        rows = len(slots)
        paused = len(running.live) - rows
        for prefill, length in parts:
            prefill.computed += length
        sources = np.arange(rows)
        ready = [i for i, (prefill, _) in enumerate(parts) if not prefill.remaining]
        if ready:
            joined = running.go_live([parts[i][0] for i in ready])
            sources = np.concatenate([sources, rows + np.array(ready)[joined]])
            slots = np.concatenate([slots, running.live.active[-len(joined) :]])
        drawn = None
        if len(slots):
            drawn = self._draw(slots, logits[uploaded(sources, logits.device)] if parts else logits)
        self._settle()
        self._pending = drawn
        if not (self._overlap and running.alive):
            self._settle()
        prefilled = int(packed.query_lens[rows:].sum())
        self.tally.prefilled_tokens += prefilled
        return StepSample(rows, int(packed.seq_lens[:rows].sum()), prefilled, 0.0), paused

    def _draw(self, slots: IntArray, logits: torch.Tensor) -> PendingTokens:
        """Draws a token for the row in each of ``slots`` from its row of ``logits``, without waiting for it."""
        live, positions = self._scheduler.live, self._scheduler.live.generated[slots]
        sampled = self._sync.drawn(sample(logits, live.sampling(slots), uploaded(positions, logits.device)))
        drawn = PendingTokens.of(slots, positions, sampled)
        live.advance(slots, sampled.tokens)
        self.tally.drawn_tokens += len(slots)
        return drawn

    def _settle(self) -> bool:
        """Reads what is outstanding and finishes the rows that end with it. Returns whether anything was."""
        drawn, self._pending = self._pending, None
        if drawn is None:
            return False
        live, slots, positions = self._scheduler.live, drawn.slots, drawn.positions
        tokens, logprobs, sampler = drawn.read()
        live.broken[slots] |= ~np.isfinite(logprobs)
        wanted = ~live.over[slots]
        live.receive(slots[wanted], positions[wanted], tokens[wanted], logprobs[wanted], sampler[wanted])
        stopped = np.isin(tokens, self._eos) & ~live.ignore_eos[slots]
        for i in np.flatnonzero(live.has_stops[slots] & wanted & ~stopped).tolist():
            stopped[i] = self._stops(int(slots[i]), int(tokens[i]))
        ended = stopped | live.broken[slots] | (positions + 1 >= live.limits[slots])
        for i in np.flatnonzero(wanted & ended).tolist():
            self._finish(int(slots[i]), bool(stopped[i]))
        # A step that is under way still writes to what other rows that have ended hold, maybe numbers not finite.
        for slot in slots[live.over[slots] & (positions + 1 == live.generated[slots])].tolist():
            self._scheduler.leave(slot, scrub=bool(live.broken[slot]))
        return True

    def _stops(self, slot: int, token: int) -> bool:
        """Whether a stop id or stop string of the row's own ends it."""
        params = self._scheduler.live.row(slot).request.params
        if token in params.stop_token_ids:
            return True
        return bool(params.stop) and self._text.ends_at_stop(self._scheduler.live.completed(slot), params.stop)

    def _finish(self, slot: int, stopped: bool) -> None:
        """Makes the record of a row that ends with its last token that is here."""
        live = self._scheduler.live
        row, completion = live.row(slot), live.completion(slot)
        live.end(slot)
        if live.broken[slot]:
            error = "The model's logits are not finite."
            self._record_builder.fail(row.request, row.sample, completion, "not_finite", error)
            return
        cut = not stopped and len(completion) >= row.limit
        self._queue.learn(row, len(completion))
        self._finished.append(FinishedRow(len(row.group.prompt_ids), len(completion), cut))
        self._record_builder.finish(row.request, row.sample, completion, "stop" if stopped else "length")

    # -- when memory runs out ------------------------------------------------------------------------

    def _back_off(self) -> None:
        """After an allocator failure: fewer rows, then smaller prefills, then patience with the only row."""
        running = self._scheduler
        alive = running.alive  # before rows end, and those whose first token could not be drawn make way: maybe all
        self._settle()
        self.tally.out_of_memory_events += 1
        self._calm = 0
        for slot in running.live.without_token()[::-1].tolist():  # each goes before those that wait
            running.preempt(slot)
        logger.warning("Out of memory with %d rows alive; going on with fewer.", alive)
        longest = 0 if running.recurrent else max((prefill.remaining for prefill in running.prefills), default=0)
        if alive > 1:
            self._oom_rows = alive // 2
            running.preempt_beyond(self._oom_rows)
        elif longest > 1 and self._oom_prefill != 1:
            self._oom_prefill = min(longest, self._oom_prefill or longest) // 2
        else:
            running.preempt_youngest()
        if running.recurrent:  # a state may hold the token already that its row would decode from again
            for slot in running.live.active[::-1].tolist():
                running.preempt(slot)
        running.drop_free_slabs()
        self._runner.shed()
        self._memory.hand_back()
        if not running.alive and len(self._queue):
            self._wait_or_give_up(self._memory.pool.layout.pages_for(1))

    def _calm_down(self) -> None:
        self._calm += 1
        if self._calm % _CALM_STEPS == 0:
            self._oom_rows = None if self._oom_rows is None else 2 * self._oom_rows
            self._oom_prefill = None

    def _wait_or_give_up(self, pages: int) -> None:
        """When the next row, which wants ``pages``, lacks some of them or room to compute on an empty device.

        Others may give memory back; a row is given up when it could never fit, or when no token was drawn for long.
        """
        now = self._sync.measured(time.monotonic())
        self._stuck_since = self._stuck_since or now
        if self._memory.could_hold(pages, int(self._scheduler.recurrent)) and now - self._stuck_since < _PATIENCE_S:
            time.sleep(_RETRY_S)
            return
        self._stuck_since = None
        self._give_up()

    def _give_up(self) -> None:
        row = self._queue.pop()
        error = f"A sample of more than {len(row.context)} tokens does not fit into memory, even alone."
        self._record_builder.fail(row.request, row.sample, row.completion, "too_large", error)

    # -- telling -------------------------------------------------------------------------------------

    def _account(self, decision: Decision, done: StepSample, alive: int, paused: int) -> None:
        """One step more, with ``alive`` rows in it, in the books of the policy, the totals and whoever listens."""
        waiting, pool, tally = len(self._queue), self._memory.pool, self.tally
        told, self._told = self._told, (tally.drawn_tokens, tally.preempted_rows, tally.out_of_memory_events)
        new_tokens, preempted, out_of_memory = (now - before for now, before in zip(self._told, told, strict=True))
        self._steps.append(done)
        tally.steps += 1
        tally.paused_row_steps += paused
        tally.saw_live_rows(alive, waiting)
        if self._on_step is not None:
            self._on_step(
                StepReport(
                    step=tally.steps,
                    live_rows=alive,
                    paused_rows=paused,
                    waiting_rows=waiting,
                    row_target=decision.rows,
                    reason=decision.reason,
                    kv_tokens=pool.used_pages * pool.layout.page_size,
                    kv_bytes=self._memory.bytes_held,
                    headroom_bytes=self._memory.headroom_bytes,
                    prefill_tokens=done.prefill_tokens,
                    new_tokens=new_tokens,
                    preempted_rows=preempted,
                    out_of_memory_events=out_of_memory,
                    step_ms=done.ms,
                )
            )
