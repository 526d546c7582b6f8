"""The library: generation on a live transformers module."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from typing import Any, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from rollout.batcher.admission_order import Ordering
from rollout.batcher.registry import make_policy
from rollout.batcher.types import Bounds, Policy
from rollout.engine.detokenizer import Detokenizer
from rollout.engine.kv_memory import KVMemory
from rollout.engine.loop import Loop
from rollout.engine.tp_sync import sync_for
from rollout.engine.waiting_queue import WaitingQueue
from rollout.engine_arguments import argument_checks
from rollout.errors import InputError, check_all
from rollout.headroom.headroom import Headroom, after_reserve, headroom_over
from rollout.length_history import LengthHistory
from rollout.models.attention.names import AUTO
from rollout.models.module.inspect import context_limit, output_device, unwrap_model, vocabulary_size
from rollout.models.patches.linears import PackedLinears
from rollout.models.patches.norms_and_rope import FusedModules
from rollout.models.patches.shared_inputs import layers_with_shared_inputs
from rollout.models.runners.select import select_strategy
from rollout.records import Batch, Record
from rollout.requests import Request, StepReport, in_windows
from rollout.sampling_params import SamplingParams
from rollout.stats import Stats

#: Rows that are read before the first decision; their size sets the size of a slab.
_FIRST_ROWS = 64

#: Prompts whose lengths are remembered from call to call, and how many of a list are put in order together.
_REMEMBERED = 1 << 16
_WINDOW = 1 << 12

#: Of the headroom, what packed copies of linear weights may take; the rest is for keys and values.
_COPIES_SHARE = 0.5

logger = logging.getLogger(__name__)

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""A text, a list of chat messages, or token ids."""


class Engine:
    """Generates with a live module: its own weights, no copy, and it is given back as it was.

    Args:
        model: a transformers causal LM, PEFT-wrapped or not, on one device, or on several as accelerate places it; or,
            with transformers' tensor parallelism, a share of one: then all processes that hold it make an engine, call
            the same methods in the same order with the same arguments, and get the same records.
        tokenizer: for text prompts, chat messages and the text of completions; None when prompts are
            token ids and no text is wanted.
        policy: how many rows live, by name or as an object of your own. With tensor parallelism each process has
            one, which must decide by what it observes alone.
        latency_budget_ms: what a step may take; None is no budget.
        max_rows, min_rows: bounds on live rows.
        max_kv_bytes: never more KV bytes than this; None uses all headroom.
        reserve_fraction: share of the device's total memory that is always left free.
        attention: a backend by name (`rollout.models.attention.names`); ``auto`` is the fastest of the engine's own.
        headroom: telemetry to follow instead of that of the devices.

    Raises:
        UnsupportedModel: the model cannot be served, or not by that attention; the message says why.
        InputError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        policy: str | Policy = "predictive",
        latency_budget_ms: float | None = None,
        max_rows: int = 1024,
        min_rows: int = 1,
        max_kv_bytes: int | None = None,
        reserve_fraction: float = 0.05,
        attention: str = AUTO,
        headroom: Headroom | None = None,
    ) -> None:
        check_all(
            argument_checks(
                latency_budget_ms=latency_budget_ms,
                max_rows=max_rows,
                min_rows=min_rows,
                max_kv_bytes=max_kv_bytes,
                reserve_fraction=reserve_fraction,
                attention=attention,
            )
        )
        self.model = model
        self.tokenizer = tokenizer
        self.weight_version = 0
        """Stamped on records; set it when the weights change."""
        base = unwrap_model(model)
        self._device = output_device(model)
        self._sync = sync_for(model)
        self._strategy = select_strategy(model, attention)
        self.attention = self._strategy.attention()
        """What attends: triton, compiled, gather; varlen or flash_attn to prefills, and after a + what attends to rows
        that decode; own: the model itself; none: nothing."""
        logger.info("The %s tier serves the model; attention: %s.", self._strategy.name, self.attention)
        bounds = Bounds(min_rows, max_rows, latency_budget_ms)
        self._policy = make_policy(policy, bounds) if isinstance(policy, str) else policy
        self._max_kv_bytes = max_kv_bytes
        self._reserve_fraction = reserve_fraction
        if headroom is None:
            headroom = headroom_over(
                self._strategy.kv_layout().shares(self._device) or {self._device: 1.0}, reserve_fraction
            )
        self._headroom = self._sync.headroom(headroom)
        self.context_limit = context_limit(base.config)
        """Most tokens of prompt and completion together; None when the model states none."""
        self._vocabulary = vocabulary_size(model)
        self._text = Detokenizer(tokenizer)
        self._eos = _eos_ids(base.generation_config)
        _warn_of_unapplied(base.generation_config)
        self._lengths = LengthHistory(_REMEMBERED)
        self._ordering = Ordering()
        self.stats: Stats | None = None
        """Totals of the last call that ran to its end or was closed."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        seed: int = 0,
        row_ids: Sequence[str] | None = None,
    ) -> Batch:
        """Completions of all prompts: records in prompt order, then sample order.

        Args:
            prompts: texts, chat message lists or token-id lists.
            params: one for all, or one a prompt.
            seed: with the row id, the sample and the position, all that a draw depends on.
            row_ids: strings that key the draws; the prompt's index by default.

        Raises:
            InputError: lists differ in length, ids repeat, or a prompt cannot be tokenised.
        """
        prompts = list(prompts)
        ids = [str(i) for i in range(len(prompts))] if row_ids is None else list(row_ids)
        if len(ids) != len(prompts):
            raise InputError(f"row_ids has {len(ids)} entries, but there are {len(prompts)} prompts.")
        if len(set(ids)) != len(ids):
            raise InputError("row_ids must differ from each other.")
        order = {row_id: i for i, row_id in enumerate(ids)}
        records = list(self.stream(prompts, params, seed=seed, row_ids=ids))
        records.sort(key=lambda record: (order[record.row_id], record.sample))
        assert self.stats is not None
        return Batch(tuple(records), self.stats)

    def stream(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        seed: int = 0,
        row_ids: Iterable[str] | None = None,
    ) -> Iterator[Record]:
        """Like `generate`, but yields records as they finish, and reads ``prompts`` only as rows are admitted.

        A sequence of prompts is at hand anyway, so that prompts that an earlier call completed can be put in order: up
        to 4096 of them are looked at together, and those that were long then start early enough.
        """
        many = params if isinstance(params, Sequence) else None
        if many is not None and isinstance(prompts, Sequence) and len(many) != len(prompts):
            raise InputError(f"params has {len(many)} entries, but there are {len(prompts)} prompts.")
        one = params if isinstance(params, SamplingParams) else SamplingParams()
        ids = (str(i) for i in count()) if row_ids is None else iter(row_ids)
        requests = (
            self._expecting(Request(next(ids), self.encode(prompt), one if many is None else many[i], seed))
            for i, prompt in enumerate(prompts)
        )
        return self.run(in_windows(requests, _WINDOW) if isinstance(prompts, Sequence) and self._lengths else requests)

    def _expecting(self, request: Request) -> Request:
        """With the length that earlier calls' completions of the prompt had."""
        return replace(request, expected_tokens=self._lengths.expected(request.prompt_ids))

    def run(
        self, requests: Iterable[Request], *, on_step: Callable[[StepReport], None] | None = None
    ) -> Iterator[Record]:
        """Generates for a stream of requests; records come as they finish.

        Between records the module is its owner's: it is switched to the engine only while steps run.
        """
        started = time.perf_counter()
        self.stats = None
        layout = self._strategy.kv_layout()
        # Before memory is read: the copies take their share.
        room = after_reserve(self._headroom, self._reserve_fraction) * _COPIES_SHARE
        linears = PackedLinears(self.model, int(room), layers_with_shared_inputs(self.model))
        # Recurrent states carry differences of rounding on and on, so those models keep their own arithmetic.
        fused = nullcontext if layout.states else FusedModules(self.model).applied
        queue = WaitingQueue(requests, self.context_limit, self._vocabulary, self._ordering)
        queue.fill(_FIRST_ROWS)
        memory = KVMemory(
            layout,
            self._headroom,
            self._device,
            self._max_kv_bytes,
            self._reserve_fraction,
            queue.demand,
            max(1, len(queue)),
            self._sync,
        )
        loop = Loop(
            self._strategy.runner(memory.pool),
            memory,
            self._policy,
            self._text,
            self._eos,
            queue,
            self.weight_version,
            on_step,
            together=self._sync,
        )
        try:
            while True:
                loop.refill()
                with self._strategy.borrow(), linears.applied(), fused():
                    records = loop.advance()
                if records is None:
                    return
                for record in records:
                    self._lengths.learn(record)
                yield from records
        finally:
            loop.close()
            seconds = time.perf_counter() - started
            self.stats = loop.tally.stats(memory.peak_bytes, memory.bytes_held, seconds)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: chat messages go through the chat template, text is used as it is.

        Raises:
            InputError: there is no tokenizer, or no chat template for messages.
        """
        if isinstance(prompt, str):
            return list(self._tokenizer_for("texts")(prompt)["input_ids"])
        # `Mapping` is slow to ask for, and a prompt may have thousands of ids.
        if any(not isinstance(item, int) and isinstance(item, Mapping) for item in prompt):
            tokenizer = self._tokenizer_for("chat messages")
            if tokenizer.chat_template is None:
                raise InputError("The prompt is a list of chat messages, but the tokenizer has no chat template.")
            encoded: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
            return list(encoded["input_ids"])
        return [operator.index(item) for item in cast(Sequence[int], prompt)]

    def _tokenizer_for(self, kind: str) -> Any:
        if self.tokenizer is None:
            raise InputError(f"The engine has no tokenizer for {kind}: give it one, or give lists of token ids.")
        return self.tokenizer


def _eos_ids(generation_config: Any) -> list[int]:
    """End-of-sequence ids; a model may have several."""
    eos = getattr(generation_config, "eos_token_id", None)
    return [] if eos is None else [int(i) for i in (eos if isinstance(eos, list | tuple) else [eos])]


def _warn_of_unapplied(generation_config: Any) -> None:
    """Says which of the model's default logits processors ``generate`` would apply and this engine does not."""
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": None, "bad_words_ids": None}
    neutral |= {"begin_suppress_tokens": None, "min_length": 0, "min_new_tokens": None, "forced_eos_token_id": None}
    for name, value in neutral.items():
        found = getattr(generation_config, name, value)
        if found not in (None, value):
            logger.warning("The model's generation_config has %s=%r, which is not applied.", name, found)
