"""Generate for a stream of requests: what is left of an engine's work once prompts are token ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from rollout.batcher.admission_order import Ordering
from rollout.batcher.types import Policy
from rollout.engine.completion_ends import CompletionEnds
from rollout.engine.early_stop import EarlyStop
from rollout.engine.kept_memory import KeptMemory, KVKey, OpenSessions
from rollout.engine.kv_memory import KVMemory
from rollout.engine.live_module import LiveModule
from rollout.engine.loop import Loop
from rollout.engine.parity import ParityMeter, ParitySample
from rollout.engine.reasoning import reasoning_splitter
from rollout.engine.resumed_prompts import ResumeCheck
from rollout.engine.vocabulary import LiveVocabulary
from rollout.engine.waiting_queue import WaitingQueue
from rollout.headroom.headroom import Headroom, after_reserve
from rollout.length_history import LengthHistory
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.module.inspect import context_limit, unwrap_model
from rollout.models.runners.base import Runner
from rollout.records import Record
from rollout.requests import Request, StepReport
from rollout.stats import Stats
from rollout.stop_conditions import StopConditions

OnRecord = Callable[[Request, Record], None]

#: Rows read before the first decision; their lengths set the slab size.
_FIRST_ROWS = 64
#: Prompts whose completion lengths are remembered between calls.
_REMEMBERED_PROMPTS = 1 << 16


class Generation:
    """Runs calls on a live module, one at a time.

    Args:
        module: the live module.
        tokenizer: decodes completions; None if no text is wanted.
        policy: decides how many rows may live.
        headroom: free memory to follow.
        max_kv_bytes: limit on KV bytes; None: all headroom.
        reserve_fraction: share of the device's total memory to leave free.
        latency_budget_ms: time limit of a step; None: no limit.
        skip_special_tokens: leave special tokens out of the text.
        split_reasoning: tell reasoning from text.
    """

    def __init__(
        self,
        module: LiveModule,
        tokenizer: PreTrainedTokenizerBase | None,
        policy: Policy,
        headroom: Headroom,
        *,
        max_kv_bytes: int | None,
        reserve_fraction: float,
        latency_budget_ms: float | None,
        skip_special_tokens: bool,
        split_reasoning: bool,
    ) -> None:
        self._module = module
        self._policy = policy
        self.headroom = headroom
        self._max_kv_bytes = max_kv_bytes
        self._reserve_fraction = reserve_fraction
        self._latency_budget_ms = latency_budget_ms
        self._base = unwrap_model(module.model)
        self.context_limit = context_limit(self._base.config)
        """Maximum tokens of prompt and completion together; None if the model states no limit."""
        self.vocabulary = LiveVocabulary(module.model, tokenizer, skip_special_tokens=skip_special_tokens)
        """Token ids as the module and the tokenizer know them now."""
        self._reasoning = reasoning_splitter(tokenizer, split=split_reasoning, skip_special_tokens=skip_special_tokens)
        self._ends = CompletionEnds(tokenizer)
        self.pad_id = _pad_id(self._base.generation_config, tokenizer)
        """The id that a trainer pads with."""
        self._parity = ParityMeter(module, pad_id=self.pad_id)
        self.lengths = LengthHistory(_REMEMBERED_PROMPTS)
        """Completion lengths of earlier calls."""
        self._ordering = Ordering()
        self.sessions = OpenSessions()
        """What open sessions keep."""
        self.stats: Stats | None = None
        """Totals of the last call that ended."""
        self.undelivered: tuple[Record, ...] = ()
        """Records of the last call that it could not deliver, since it was closed or interrupted."""

    def run(
        self,
        requests: Iterable[Request | None],
        *,
        on_step: Callable[[StepReport], None] | None = None,
        stop: StopConditions | None = None,
        reads_all: bool = True,
        on_record: OnRecord | None = None,
        kept: KeptMemory | None = None,
        weights_fixed: bool = False,
    ) -> Generator[Record, None, None]:
        """Generate for a stream of requests and yield records as they finish.

        The module is borrowed only while steps run, so between records it is as its owner left it.

        Args:
            requests: the stream; None in it says that there is no request at this time, and more may come.
            on_step: called with a report of every step.
            stop: ends samples, prompts, or the call, early; None: nothing does.
            weights_fixed: weights stay as they are until the call ends, so look at them only when it begins.
            reads_all: with ``stop``: once the call ends, requests that have not been read become abort records as well.
            on_record: called with every record and its request.
            kept: memory of a session: rows begin with what earlier calls left there, and leave theirs.

        Raises:
            UnsupportedModel: the model's active PEFT adapter cannot be served.
            InputError: the tokenizer is no longer the model's.
        """
        with self._module.call():
            yield from self._run(requests, on_step, stop, reads_all, on_record, kept, weights_fixed)

    def _run(
        self,
        requests: Iterable[Request | None],
        on_step: Callable[[StepReport], None] | None,
        stop: StopConditions | None,
        reads_all: bool,
        on_record: OnRecord | None,
        kept: KeptMemory | None,
        weights_fixed: bool,
    ) -> Generator[Record, None, None]:
        """Generate while the module's weights are gathered."""
        start = time.perf_counter()
        self.stats = None
        self.undelivered = ()
        vocabulary = self.vocabulary.read()
        requests = self._ends.applied(requests, vocabulary.eos_ids, self._base.generation_config)
        requests = ResumeCheck(
            vocabulary.detokenizer,
            eos_ids=vocabulary.eos_ids,
            vocab_size=vocabulary.size,
            context_limit=self.context_limit,
        ).applied(requests)
        early_stop = EarlyStop(stop, reads_all, self._module.sync) if stop else None
        # Before the KV budget: the packed weights take their share of memory.
        layout = self._module.prepare(self._free_bytes)
        queue = WaitingQueue(
            requests if early_stop is None else early_stop.watched(requests),
            context_limit=self.context_limit,
            vocab_size=vocabulary.size,
            ordering=self._ordering,
            compile_rules=vocabulary.rules.compile,
        )
        queue.fill(_FIRST_ROWS)
        key = self._kv_key(layout)
        seen = self._module.seen
        taken = None if kept is None else kept.take(key, seen.moves)
        kv = self._kv_memory(layout, queue, kept) if taken is None else taken.kv
        sample, parity = ParitySample(), None
        loop = Loop(
            runner=self._runner(kv) if taken is None or taken.runner is None else taken.runner,
            kv=kv,
            policy=self._policy,
            queue=queue,
            detokenizer=vocabulary.detokenizer,
            reasoning=self._reasoning,
            eos_ids=vocabulary.eos_ids,
            weight_version=self._module.version.number,
            on_step=on_step,
            on_record=_each(sample.add, on_record),
            sync=self._module.sync,
            early_stop=early_stop,
        )
        peak_kv_bytes = 0  # of the pages before those in use
        resumed = False  # the weights are the caller's while it has a record
        records: list[Record] | None = None
        delivered = 0
        try:
            while True:
                loop.refill()
                records, delivered = None, 0
                if resumed and not weights_fixed:
                    self._module.look()
                    # Not what this look returns: a call inside the stream may have looked before.
                    before, seen = seen, self._module.seen
                    layout = self._module.layout()
                    moved = seen.moves != before.moves or layout is not kv.pool.layout
                    if moved or seen.calls != before.calls or seen.changes != before.changes:
                        self._module.fit(self._free_bytes)
                    loop.use_weights(self._module.version.number, changed=moved or seen.changes != before.changes)
                    if moved:
                        peak_kv_bytes = max(peak_kv_bytes, kv.peak_bytes)
                        kv = self._kv_memory(layout, queue, kept)
                        loop.move(self._runner(kv), kv)
                    key = self._kv_key(layout)
                with self._module.borrowed():
                    records = loop.advance()
                if records is None:
                    loop.close(resting=kept is not None)  # the comparison finds the memory of the call free again
                    parity = self._parity.measure(sample, steps=loop.tally.steps, tokens=loop.tally.computed_tokens)
                    return
                for record in records:
                    self.lengths.learn(record)
                for record in records:
                    delivered += 1  # before the yield: a stream that is closed there has been given the record
                    yield record
                resumed = bool(records)
        except BaseException as ending:
            self.undelivered = (*(records or ())[delivered:], *loop.abandon())
            if not isinstance(ending, GeneratorExit):
                # A step that was interrupted may have left pages half written or wrongly counted.
                kv.cache.clear()
                kept = None
            raise
        finally:
            loop.close(resting=kept is not None)
            if kept is not None:
                kept.put(kv, key, loop.runner, seen.moves)
            self.stats = loop.tally.stats(
                peak_kv_bytes=max(peak_kv_bytes, kv.peak_bytes),
                kv_bytes_held=kv.bytes_held,
                seconds=time.perf_counter() - start,
                parity=parity,
            )

    def _runner(self, kv: KVMemory) -> Runner:
        runner = self._module.strategy.runner(kv.pool)
        runner.latency_budget_ms = self._latency_budget_ms
        return runner

    def _free_bytes(self) -> float:
        return after_reserve(self.headroom, self._reserve_fraction)

    def _kv_key(self, layout: KVLayout) -> KVKey:
        return KVKey(layout, self._module.autocast, self._module.seen.changes)

    def _kv_memory(self, layout: KVLayout, queue: WaitingQueue, kept: KeptMemory | None) -> KVMemory:
        return KVMemory(
            layout,
            self.headroom,
            self._module.device,
            max_kv_bytes=self._max_kv_bytes,
            reserve_fraction=self._reserve_fraction,
            expected_tokens=max(queue.max_tokens, 0 if kept is None else kept.slab_tokens),
            expected_rows=max(1, len(queue)),
            sync=self._module.sync,
            idle=self.sessions,
            kept_bytes=0 if kept is None else kept.limit,
        )


def _each(first: OnRecord, second: OnRecord | None) -> OnRecord:
    """Return what calls both."""
    if second is None:
        return first

    def call(request: Request, record: Record) -> None:
        first(request, record)
        second(request, record)

    return call


def _pad_id(generation_config: Any, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return the id that a trainer pads with, as far as it is known; masks leave it out."""
    named = [getattr(tokenizer, "pad_token_id", None), getattr(generation_config, "pad_token_id", None)]
    return next((int(i) for i in named if i is not None), 0)
