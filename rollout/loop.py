"""The generation loop: each step decides how many rows may live, fits memory, admits, decodes and retires."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from rollout.batcher.types import Decision, FinishedRow, Observation, Policy, StepSample
from rollout.live import LiveRows
from rollout.memory import Memory, is_out_of_memory
from rollout.models.paged import Segment
from rollout.models.runner import Runner
from rollout.models.sampling import sample
from rollout.queue import Queue
from rollout.records import FinishReason, Record
from rollout.requests import Request, StepReport
from rollout.rows import NOTHING, Completion, IntArray, Prefill, Row
from rollout.stats import Tally
from rollout.stops import Text

logger = logging.getLogger("rollout.batcher")

_EMPTY: IntArray = np.zeros(0, np.int64)
#: Share of the pool that admission leaves free while rows live, for the tokens they are about to add.
_WATERMARK = 0.02
#: Waiting rows that are read before anything is known of the memory that rows take.
_FIRST_ROWS = 64
#: Steps without an allocator failure after which the cap that one had set is doubled.
_CALM_STEPS = 256
#: How long an empty device may be squeezed by others before a row is given up.
_PATIENCE_S = 60.0


class Loop:
    """Generates for a stream of requests. Call `advance` until it returns None, then `close`.

    Args:
        runner, memory: the model on its pages.
        policy: decides how many rows may live.
        text: detokenises and finds stop strings.
        eos: end-of-sequence ids.
        queue: rows that wait.
        weight_version: stamped on records.
        on_step: told of every step.
    """

    def __init__(
        self,
        runner: Runner,
        memory: Memory,
        policy: Policy,
        text: Text,
        eos: Iterable[int],
        queue: Queue,
        weight_version: int = 0,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> None:
        self._runner, self._memory, self._policy, self._text = runner, memory, policy, text
        self._pool = memory.pool
        self._page_size = self._pool.layout.page_size
        self._eos = np.fromiter(eos, np.int64)
        self._queue = queue
        self._weight_version = weight_version
        self._on_step = on_step
        self._live = LiveRows(self._page_size, self._pool.device)
        self._prefills: list[Prefill] = []
        self._records: list[Record] = []
        self._samples: list[StepSample] = []
        self._finished: list[FinishedRow] = []
        self._cap: int | None = None
        self._prefill_cap: int | None = None
        self._calm = 0
        self._target: int | None = None
        self._squeezed_since: float | None = None
        self._told_over_budget = False
        self.tally = Tally()

    # -- the loop ------------------------------------------------------------------------------------

    def advance(self) -> list[Record] | None:
        """Steps until records are finished or the queue wants to read on; None when all is done."""
        while self._queue or self._alive:
            if self._queue.wants(self._lookahead):
                return self._take_records()
            self._step()
            if self._records:
                return self._take_records()
        return self._take_records() or None

    def refill(self) -> None:
        """Reads on in the stream of requests, as far as the next steps may admit."""
        self._queue.fill(self._lookahead)
        for request, error_class, message in self._queue.refused:
            for number in range(request.params.n) if request.samples is None else request.samples:
                self._records.append(self._error_record(request, number, NOTHING, error_class, message))
        self._queue.refused.clear()

    def _step(self) -> None:
        started = time.perf_counter()
        preempted = self.tally.preempted_rows
        try:
            decision = self._decide()
            self._fit_memory()
            self._preempt_beyond(decision.rows)
            self._admit(decision)
            prefilled = self._prefill(decision.prefill_tokens)
            decoded = self._decode()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._back_off()
            return
        self._calm_down()
        rows, kv_tokens = decoded
        done = StepSample(rows, kv_tokens, prefilled, 1e3 * (time.perf_counter() - started))
        self._account(decision, done, self.tally.preempted_rows - preempted)

    def close(self) -> None:
        """Drops all rows and gives all memory back."""
        for slot in self._live.active.tolist():
            self._leave(slot)
        for prefill in self._prefills:
            self._pool.release(prefill.pages)
        self._prefills.clear()
        while self._pool.shrink([]):
            pass

    @property
    def _alive(self) -> int:
        return len(self._live) + sum(len(prefill.rows) for prefill in self._prefills)

    @property
    def _lookahead(self) -> int:
        """How many waiting rows must be known: those that the next step may admit, and one more to see that any wait.

        No further, so that what is not needed here is left to other workers.
        """
        if not self._alive or self._target is None:
            return _FIRST_ROWS
        pages_per_row = max(1.0, self._pool.used_pages / self._alive)
        fitting = int(self._memory.obtainable_pages / pages_per_row)
        return 1 + min(max(0, self._target - self._alive), fitting)

    def _take_records(self) -> list[Record]:
        taken, self._records = self._records, []
        return taken

    # -- deciding ------------------------------------------------------------------------------------

    def _decide(self) -> Decision:
        started = time.perf_counter()
        self._memory.read()
        decision = self._policy.decide(self._observe())
        if self._cap is not None and self._cap < decision.rows:
            decision = Decision(self._cap, decision.prefill_tokens, "oom")
        if decision.rows != self._target:
            logger.info("step %d: row target %s -> %d (%s)", self.tally.steps, self._target, decision.rows, decision.reason)
            self._target = decision.rows
        if decision.reason == "over_budget" and not self._told_over_budget:
            self._told_over_budget = True
            logger.warning("A step of %d row(s) takes longer than the latency budget; going on so.", decision.rows)
        self.tally.deciding_seconds += time.perf_counter() - started
        return decision

    def _observe(self) -> Observation:
        live, layout = self._live, self._pool.layout
        starting = [row for prefill in self._prefills for row in prefill.rows]

        def joined(decoding: IntArray, others: list[int]) -> IntArray:
            return np.concatenate([decoding[live.active], np.array(others, np.int64)])

        observation = Observation(
            prompt_tokens=joined(live.prompt_lengths, [len(row.group.prompt_ids) for row in starting]),
            generated_tokens=joined(live.generated, [len(row.completion) for row in starting]),
            max_new_tokens=joined(live.limits, [row.limit for row in starting]),
            waiting_rows=len(self._queue),
            waiting_prompt_tokens=self._queue.waiting_prompt_tokens,
            kv_tokens_held=self._pool.used_pages * self._page_size,
            kv_tokens_free=self._memory.obtainable_pages * self._page_size,
            headroom_bytes=self._memory.headroom_bytes,
            bytes_per_token=layout.bytes_per_token,
            steps=tuple(self._samples),
            finished=tuple(self._finished),
        )
        self._samples.clear()
        self._finished.clear()
        return observation

    # -- memory --------------------------------------------------------------------------------------

    def _fit_memory(self) -> None:
        """Gives slabs back when others need the memory; rows are preempted only when pages cannot be moved."""
        for _ in range(self._memory.excess_slabs):
            while not self._pool.shrink(self._page_views()):
                if not self._preempt_youngest():
                    return

    def _page_views(self) -> list[IntArray]:
        """All arrays that name pages, to be rewritten when pages move."""
        groups = {id(row.group): row.group for row in (self._live.row(slot) for slot in self._live.active.tolist())}
        held = [prefill.pages for prefill in self._prefills]
        return self._live.all_pages() + held + [group.pages for group in groups.values()]

    def _back_off(self) -> None:
        """After an allocator failure: fewer rows, then smaller prefills, and at last an error for the only row."""
        self.tally.out_of_memory_events += 1
        self._calm = 0
        live = self._live
        for slot in live.active[live.generated[live.active] == 0].tolist():
            self._preempt(slot)
        alive = self._alive
        logger.warning("Out of memory with %d rows alive; going on with fewer.", alive)
        if alive > 1:
            self._cap = alive // 2
            self._preempt_beyond(self._cap)
        elif self._prefills and self._prefills[0].remaining > self._page_size and self._prefill_cap != self._page_size:
            self._prefill_cap = max(self._page_size, min(self._prefill_cap or 1 << 30, self._prefills[0].remaining) // 2)
        elif self._preempt_youngest():
            self._give_up(self._queue.pop())
        while self._pool.free_pages >= self._pool.slab_pages and self._pool.shrink(self._page_views()):
            pass
        if self._pool.device.type == "cuda":
            torch.cuda.empty_cache()

    def _calm_down(self) -> None:
        self._calm += 1
        if self._calm % _CALM_STEPS == 0:
            self._cap = None if self._cap is None else 2 * self._cap
            self._prefill_cap = None

    # -- preempting ----------------------------------------------------------------------------------

    def _preempt_beyond(self, rows: int) -> None:
        while self._alive > rows and self._preempt_youngest():
            pass

    def _preempt_youngest(self) -> bool:
        """Puts the youngest row back into the queue; its tokens are kept, its pages dropped."""
        if self._prefills:
            prefill = self._prefills[-1]
            self._queue.put_back([prefill.rows.pop()])
            if not prefill.rows:
                self._prefills.remove(prefill)
                self._pool.release(prefill.pages)
                self.tally.recomputed_tokens += prefill.computed
                self._close_to_joiners(prefill)
            self.tally.preempted_rows += 1
            return True
        if len(self._live):
            self._preempt(int(self._live.active[-1]))
            return True
        return False

    def _preempt(self, slot: int) -> None:
        row = self._live.row(slot)
        row.completion = self._live.completion(slot)
        self.tally.preempted_rows += 1
        self.tally.recomputed_tokens += len(row.group.prompt_ids) + max(0, len(row.completion) - 1)
        self._leave(slot)
        self._queue.put_back([row])

    def _leave(self, slot: int, scrub: bool = False) -> None:
        """Takes a row out of the live batch and drops its pages."""
        group = self._live.row(slot).group
        self._pool.release(self._live.pages(slot), scrub)
        self._live.remove(np.array([slot]))
        group.holders -= 1
        if not group.holders:
            group.pages = _EMPTY

    # -- admitting and prefilling --------------------------------------------------------------------

    def _admit(self, decision: Decision) -> None:
        """Rows in queue order, while the decision and memory allow, onto prefills that this step can begin."""
        budget = decision.prefill_tokens - sum(prefill.remaining for prefill in self._prefills)
        while self._alive < decision.rows and (row := self._queue.first()) is not None:
            group = row.group
            if group.prefill is not None and not len(row.completion):
                if not self._memory.reserve(1 + self._spoken_for):
                    return
                group.prefill.rows.append(self._queue.pop())
                continue
            context = row.context
            shared = group.pages[: (len(context) - 1) // self._page_size]
            # One token more than the context, so that an admitted row always lives to add one.
            needed = (len(context) + 1 + self._page_size - 1) // self._page_size - len(shared)
            if budget <= 0:
                return
            if not self._memory.reserve(needed + self._spoken_for):
                if not self._alive:
                    self._wait_or_give_up(needed)
                return
            self._squeezed_since = None
            self._pool.share(shared)
            own = self._pool.allocate((len(context) + self._page_size - 1) // self._page_size - len(shared))
            computed = len(shared) * self._page_size
            prefill = Prefill(group, context, np.concatenate([shared, own]), computed, [self._queue.pop()])
            self._prefills.append(prefill)
            if not len(row.completion):
                group.prefill = prefill
            budget -= prefill.remaining

    @property
    def _spoken_for(self) -> int:
        """Free pages that admission leaves alone: forks under way, and what live rows are about to add."""
        if not self._alive:
            return 0
        forks = sum(len(prefill.rows) for prefill in self._prefills)
        total = self._pool.used_pages + self._memory.obtainable_pages
        return forks + int(_WATERMARK * total)

    def _wait_or_give_up(self, pages: int) -> None:
        """The device is empty, and the next row does not fit: others may give memory back, or it never will."""
        now = time.monotonic()
        self._squeezed_since = self._squeezed_since or now
        if self._memory.could_hold(pages) and now - self._squeezed_since < _PATIENCE_S:
            time.sleep(0.05)
            return
        self._squeezed_since = None
        self._give_up(self._queue.pop())

    def _give_up(self, row: Row) -> None:
        tokens = len(row.context)
        message = f"A sample of {tokens} tokens and more does not fit into the memory that there is, even alone."
        self._records.append(self._error_record(row.request, row.sample, row.completion, "too_large", message))

    def _prefill(self, budget: int) -> int:
        """One packed forward over the oldest prefills; returns the tokens that it computed."""
        budget = budget if self._prefill_cap is None else min(budget, self._prefill_cap)
        parts: list[tuple[Prefill, Segment]] = []
        for prefill in self._prefills:
            length = min(prefill.remaining, budget)
            if not length:
                break
            budget -= length
            end = prefill.computed + length
            pages = prefill.pages[: (end + self._page_size - 1) // self._page_size]
            parts.append((prefill, Segment(pages, prefill.computed, length)))
        if not parts:
            return 0
        logits = self._runner.prefill([p.context[s.start : s.end] for p, s in parts], [s for _, s in parts])
        for prefill, segment in parts:
            prefill.computed = segment.end
        ready = [i for i, (prefill, _) in enumerate(parts) if not prefill.remaining]
        if ready:
            self._start([parts[i][0] for i in ready], logits[ready])
        computed = sum(segment.length for _, segment in parts)
        self.tally.prefilled_tokens += computed
        return computed

    def _start(self, prefills: Sequence[Prefill], logits: torch.Tensor) -> None:
        """Rows of finished prefills join the live batch with their first tokens; ``logits`` has a row a prefill."""
        slots: list[int] = []
        sources: list[int] = []
        for number, prefill in enumerate(prefills):
            self._prefills.remove(prefill)
            self._close_to_joiners(prefill)
            prefill.group.pages = prefill.pages[: len(prefill.group.prompt_ids) // self._page_size].copy()
            for row, pages in self._fork(prefill):
                slots.append(self._live.add(row, pages))
                sources.append(number)
                prefill.group.holders += 1
        self._accept(np.array(slots), logits[sources])

    def _close_to_joiners(self, prefill: Prefill) -> None:
        if prefill.group.prefill is prefill:
            prefill.group.prefill = None

    def _fork(self, prefill: Prefill) -> list[tuple[Row, IntArray]]:
        """The prefill's pages for each of its rows: full pages are shared, a last partial one is copied."""
        full = len(prefill.context) // self._page_size
        partial = prefill.pages[full:]
        forks = [(prefill.rows[0], prefill.pages)]
        for row in prefill.rows[1:]:
            if len(partial) and not self._memory.reserve(1):
                self._queue.put_back([row])
                continue
            self._pool.share(prefill.pages[:full])
            own = self._pool.allocate(len(partial))
            self._pool.copy(partial, own)
            forks.append((row, np.concatenate([prefill.pages[:full], own])))
        return forks

    # -- decoding ------------------------------------------------------------------------------------

    def _decode(self) -> tuple[int, int]:
        """One token for every live row; returns the rows and the tokens that they attended to."""
        self._make_room()
        live = self._live
        if not len(live):
            return 0, 0
        slots, lengths = live.active, live.lengths
        tables = live.tables[slots, : int(live.page_counts[slots].max())]
        self._accept(slots, self._runner.decode(live.last_tokens(), tables, lengths))
        return len(slots), int(lengths.sum())

    def _make_room(self) -> None:
        """A page for every row that needs one; the youngest rows make way while there is none."""
        while len(slots := self._live.without_page()):
            if self._memory.reserve(len(slots)):
                self._live.give_pages(slots, self._pool.allocate(len(slots)))
            else:
                self._preempt_youngest()

    def _accept(self, slots: IntArray, logits: torch.Tensor) -> None:
        """Draws a token for each of ``slots`` from its row of ``logits``, and retires the rows that end with it."""
        live = self._live
        positions = torch.from_numpy(live.generated[slots]).to(logits.device)
        drawn = sample(logits, live.sampling(slots), positions)
        tokens, logprobs, sampler = (
            x.cpu().numpy() for x in (drawn.tokens, drawn.logprobs, drawn.sampler_logprobs)
        )
        live.append(slots, tokens, logprobs, sampler)
        stopped = np.isin(tokens, self._eos) & ~live.ignore_eos[slots]
        for i in np.flatnonzero(live.has_stops[slots] & ~stopped).tolist():
            stopped[i] = self._stops(int(slots[i]), int(tokens[i]))
        broken = ~np.isfinite(logprobs)
        ended = stopped | broken | (live.generated[slots] >= live.limits[slots])
        for i in np.flatnonzero(ended).tolist():
            self._retire(int(slots[i]), bool(stopped[i]), bool(broken[i]))

    def _stops(self, slot: int, token: int) -> bool:
        """Whether a stop id or stop string of the row's own ends it."""
        params = self._live.row(slot).request.params
        if token in params.stop_token_ids:
            return True
        return bool(params.stop) and self._text.ends_at_stop(self._live.completion(slot).tokens.tolist(), params.stop)

    # -- retiring ------------------------------------------------------------------------------------

    def _retire(self, slot: int, stopped: bool, broken: bool) -> None:
        """Turns an ended row into a record and frees its pages."""
        row, completion = self._live.row(slot), self._live.completion(slot)
        self._leave(slot, scrub=broken)
        if broken:
            message = "The model's logits are not finite."
            self._records.append(self._error_record(row.request, row.sample, completion, "not_finite", message))
            return
        self._finished.append(FinishedRow(len(row.group.prompt_ids), len(completion)))
        self._records.append(self._record(row.request, row.sample, completion, "stop" if stopped else "length"))

    def _error_record(
        self, request: Request, number: int, completion: Completion, error_class: str, error: str
    ) -> Record:
        self.tally.error_samples += 1
        return self._record(request, number, completion, "error", error_class, error)

    def _record(
        self,
        request: Request,
        number: int,
        completion: Completion,
        finish_reason: FinishReason,
        error_class: str = "",
        error: str = "",
    ) -> Record:
        self.tally.samples += 1
        self.tally.prompt_tokens += len(request.prompt_ids)
        self.tally.output_tokens += len(completion)
        ids = completion.tokens.tolist()
        text = self._text.decode(ids)
        cut = self._text.cut(text, request.params.stop) if request.params.stop else None
        return Record(
            row_id=request.row_id,
            sample=number,
            prompt_ids=list(request.prompt_ids),
            completion_ids=ids,
            text=text if cut is None else cut,
            logprobs=completion.logprobs.tolist(),
            sampler_logprobs=completion.sampler_logprobs.tolist(),
            finish_reason=finish_reason,
            error_class=error_class,
            error=error,
            seed=request.seed,
            weight_version=self._weight_version,
        )

    def _account(self, decision: Decision, done: StepSample, preempted: int) -> None:
        """One step more in the books of the policy, the totals and whoever listens."""
        self._samples.append(done)
        self.tally.steps += 1
        self.tally.saw_live_rows(self._alive, len(self._queue))
        if self._on_step is not None:
            report = StepReport(
                step=self.tally.steps,
                live_rows=self._alive,
                waiting_rows=len(self._queue),
                row_target=decision.rows,
                reason=decision.reason,
                kv_tokens=self._pool.used_pages * self._page_size,
                kv_bytes=self._pool.bytes_held,
                headroom_bytes=self._memory.headroom_bytes,
                prefill_tokens=done.prefill_tokens,
                new_tokens=done.rows,
                preempted_rows=preempted,
                step_ms=done.ms,
            )
            self._on_step(report)
