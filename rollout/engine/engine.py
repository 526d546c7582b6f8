"""The library: generate with a live transformers module."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rollout.batcher.admission_order import Ordering
from rollout.batcher.registry import bounded, make_policy
from rollout.batcher.types import Bounds, Policy
from rollout.engine.call_requests import call_requests
from rollout.engine.completion_ends import CompletionEnds
from rollout.engine.detokenizer import Detokenizer
from rollout.engine.kv_memory import KVMemory
from rollout.engine.loop import Loop
from rollout.engine.observed_call import observed_call
from rollout.engine.params_arguments import given_params
from rollout.engine.patches import make_patches
from rollout.engine.prompt_arguments import GivenPrompt, given_prompts, given_row_ids, given_seed
from rollout.engine.reasoning import reasoning_splitter
from rollout.engine.recommendations import Recommendations
from rollout.engine.rule_compiler import RuleCompiler
from rollout.engine.tp_sync import sync_for
from rollout.engine.waiting_queue import WaitingQueue
from rollout.engine_arguments import argument_checks
from rollout.errors import check_all
from rollout.headroom.headroom import Headroom, after_reserve, headroom_over, memory_name
from rollout.length_history import LengthHistory
from rollout.models.attention.names import AUTO
from rollout.models.module.adapters import refuse_adapters
from rollout.models.module.inspect import context_limit, logits_size, output_device, unwrap_model, vocabulary_size
from rollout.models.runners.select import select_strategy
from rollout.records import Batch, Record
from rollout.requests import Request, StepReport, in_windows
from rollout.sampling_params import SamplingParams
from rollout.stats import Stats
from rollout.tokenization.prompt import AddSpecialTokens, EncodingOptions, Prompt, Tool
from rollout.tokenization.prompt_encoder import PromptEncoder
from rollout.tracking.call_tracker import start_tracker

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

#: Rows read before the first decision; their lengths set the slab size.
_FIRST_ROWS = 64

#: Prompts whose completion lengths are remembered between calls.
_REMEMBERED_PROMPTS = 1 << 16
#: Prompts of a sequence that are ordered together.
_WINDOW = 1 << 12

logger = logging.getLogger(__name__)

Prompts = Iterable[Any]
"""Prompts in any form of `rollout.engine.prompt_arguments`."""
Params = SamplingParams | Mapping[str, Any] | Iterable[SamplingParams | Mapping[str, Any]] | GenerationConfig | None


class Engine:
    """Generates with a live module: uses its weights without a copy and leaves the module unchanged.

    Args:
        model: a transformers causal LM, PEFT-wrapped or not, on one device or on several as accelerate places it. With
            transformers' tensor parallelism, every rank creates an engine, calls the same methods in the same order
            with the same arguments, and gets the same records.
        tokenizer: encodes text prompts and chat messages, and decodes completions; None if prompts are token ids and
            no text is wanted.
        policy: decides how many rows may live; a name, or a `Policy` of your own. With tensor parallelism, every rank
            has its own, which must depend only on its observations.
        latency_budget_ms: time limit of a step; None: no limit.
        max_rows, min_rows: bounds on live rows, i.e. samples generated at the same time.
        max_kv_bytes: limit on KV bytes; None: all headroom.
        reserve_fraction: share of the device's total memory to leave free.
        attention: name of a backend (`rollout.models.attention.names`); ``auto``: the engine's fastest for this model.
        headroom: free memory to follow instead of the devices' own.
        skip_special_tokens: leave special tokens, such as the one that ends a completion, out of the text.
        split_reasoning: put what stands between the model's think tokens into ``reasoning`` instead of ``text``.
        chat_template: a Jinja template, its file, or the name of one of the tokenizer's; None: the tokenizer's own.
        chat_template_kwargs: further variables of the chat template, e.g. ``{"enable_thinking": False}``.
        tools: JSON schemas or functions, for chats that have none of their own.
        add_special_tokens: ``auto`` adds to texts what the tokenizer puts before them, unless a text begins with it;
            True adds all that the tokenizer adds, to rendered chats as well; False adds nothing.
        tracker: where the numbers of a job's metrics go, about once a second: ``tensorboard``, ``wandb``, ``trackio``,
            ``mlflow``, or a tracker of accelerate's.

    Raises:
        UnsupportedModel: the model, or the model with that attention, is not supported; the message says why.
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
        skip_special_tokens: bool = True,
        split_reasoning: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] | None = None,
        add_special_tokens: AddSpecialTokens = "auto",
        tracker: str | GeneralTracker | None = None,
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
        self.encoder = PromptEncoder(
            tokenizer,
            EncodingOptions(
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs or {},
                tools=tools,
                add_special_tokens=add_special_tokens,
            ),
        )
        """Turns prompts into token ids."""
        self.weight_version = 0
        """Stamped on records; set it whenever the weights change."""
        base = unwrap_model(model)
        self._device = output_device(model)
        self._sync = sync_for(model)
        self._strategy = select_strategy(model, attention)
        self.attention = self._strategy.attention()
        """Attention backend: triton, compiled or gather; varlen or flash_attn for prefills, then + and the backend for
        decoding; own: the model's code; none: the model has no attention."""
        logger.debug("Running the model's own modules with %s.", _describe(self._strategy.name, self.attention))
        bounds = Bounds(min_rows=min_rows, max_rows=max_rows, latency_budget_ms=latency_budget_ms)
        self._policy = make_policy(policy, bounds) if isinstance(policy, str) else bounded(policy, bounds)
        self._max_kv_bytes = max_kv_bytes
        self._reserve_fraction = reserve_fraction
        shares = self._strategy.kv_layout().shares(self._device) or {self._device: 1.0}
        self.memory = memory_name(shares)
        """The memory that holds the KV cache, as `memory_name` names it."""
        if headroom is None:
            headroom = headroom_over(shares, reserve_fraction)
        self._headroom = self._sync.headroom(headroom)
        self.context_limit = context_limit(base.config)
        """Maximum tokens of prompt and completion together; None if the model states no limit."""
        self._vocab_size = vocabulary_size(model)
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)
        self._reasoning = reasoning_splitter(tokenizer, split=split_reasoning, skip_special_tokens=skip_special_tokens)
        self._ends = CompletionEnds(base.generation_config, tokenizer)
        self._recommendations = Recommendations(base.generation_config)
        self._rules = RuleCompiler(
            tokenizer, eos_ids=self._ends.eos_ids, vocab_size=min(self._vocab_size, logits_size(model))
        )
        self._lengths = LengthHistory(_REMEMBERED_PROMPTS)
        self._ordering = Ordering()
        name = getattr(base.config, "name_or_path", "")
        self._log_line = start_tracker(tracker, self, {"model": name, "attention": self.attention})
        self.stats: Stats | None = None
        """Totals of the last call that finished or was closed early."""

    def generate(
        self,
        prompts: Prompts,
        params: Params = None,
        *,
        seed: int = 0,
        row_ids: Iterable[str | int] | None = None,
        attention_mask: Any = None,
        progress: bool = False,
    ) -> Batch:
        """Generate completions of all prompts; records come in prompt order, then sample order.

        A prompt that cannot be used is an error record, and the others are unaffected.

        Args:
            prompts: texts, chat message lists, token-id lists, rows of a dataset with a column ``prompt``, or a
                tokenizer's output. A single one is one prompt. Ids may be tensors or arrays, [B, P] with a mask.
            params: one for all prompts, or one per prompt: `SamplingParams`, mappings of its fields, or transformers'
                ``GenerationConfig``.
            seed: the noise of a token depends only on the seed, the row id, the sample and the position.
            row_ids: one string or whole number per prompt that keys its noise; by default the prompt's index.
            attention_mask: [B, P], 0 where the ids in ``prompts`` are padding.
            progress: draw a bar on stderr or in the notebook; of several ranks, only the first draws.

        Raises:
            InputError: an argument has no form that can be read, lists differ in length, or ids repeat.
        """
        given = list(given_prompts(prompts, attention_mask, self._pad_id))
        ids = list(map(str, range(len(given))))
        if row_ids is not None:
            ids = list(islice(given_row_ids(row_ids, given), len(given)))
        order = {row_id: i for i, row_id in enumerate(ids)}
        records = list(self._stream(given, params, seed, ids, progress))
        records.sort(key=lambda record: (order[record.row_id], record.sample))
        assert self.stats is not None
        return Batch(records=tuple(records), stats=self.stats)

    def stream(
        self,
        prompts: Prompts,
        params: Params = None,
        *,
        seed: int = 0,
        row_ids: Iterable[str | int] | None = None,
        attention_mask: Any = None,
        progress: bool = False,
    ) -> Iterator[Record]:
        """Generate like `generate`, but yield records as they finish and read ``prompts`` only as rows are admitted.

        If ``prompts`` is a sequence, up to 4096 of them are ordered together by the lengths that earlier calls
        observed, so that long completions start early.
        """
        given = given_prompts(prompts, attention_mask, self._pad_id)
        ids = (str(i) for i in count()) if row_ids is None else given_row_ids(row_ids, given)
        return self._stream(given, params, seed, ids, progress)

    def _stream(
        self, given: Iterable[GivenPrompt], params: Params, seed: int, row_ids: Iterable[str], progress: bool
    ) -> Iterator[Record]:
        if isinstance(params, SamplingParams):
            self.check_params(params)
            self._recommendations.report(params)
        each, total = given_params(params, given), None
        if progress and isinstance(given, Sequence):
            listed = list(islice(each, len(given)))
            each, total = iter(listed), sum(one.n for one in listed)
        requests = call_requests(
            given, each, given_seed(seed), iter(row_ids), encoder=self.encoder, lengths=self._lengths
        )
        if isinstance(given, Sequence) and self._lengths:
            requests = in_windows(requests, _WINDOW)
        progress = progress and not int(os.environ.get("RANK") or 0)
        if not progress and self._log_line is None:
            return self.run(requests)
        return observed_call(self.run, requests, total=total, progress=progress, log_line=self._log_line)

    def check_params(self, params: SamplingParams) -> None:
        """Refuse parameters that do not suit the model and its tokenizer.

        Raises:
            InputError: the message begins with the parameter's name.
        """
        self._rules.compile(params)

    @property
    def _pad_id(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.pad_token_id

    def run(
        self, requests: Iterable[Request], *, on_step: Callable[[StepReport], None] | None = None
    ) -> Generator[Record, None, None]:
        """Generate for a stream of requests and yield records as they finish.

        The module is borrowed only while steps run, so between records it is as its owner left it.

        Raises:
            UnsupportedModel: the model's active PEFT adapter cannot be served.
        """
        start = time.perf_counter()
        self.stats = None
        refuse_adapters(self.model)  # another adapter may be active than in the last call
        layout = self._strategy.kv_layout()
        # Before the KV budget: the packed weights take their share of memory.
        free_bytes = after_reserve(self._headroom, self._reserve_fraction)
        patches = make_patches(self.model, free_bytes, has_states=bool(layout.states))
        queue = WaitingQueue(
            self._ends.applied(requests),
            context_limit=self.context_limit,
            vocab_size=self._vocab_size,
            ordering=self._ordering,
            compile_rules=self._rules.compile,
        )
        queue.fill(_FIRST_ROWS)
        kv = KVMemory(
            layout,
            self._headroom,
            self._device,
            max_kv_bytes=self._max_kv_bytes,
            reserve_fraction=self._reserve_fraction,
            expected_tokens=queue.max_tokens,
            expected_rows=max(1, len(queue)),
            sync=self._sync,
        )
        loop = Loop(
            runner=self._strategy.runner(kv.pool),
            kv=kv,
            policy=self._policy,
            queue=queue,
            detokenizer=self._detokenizer,
            reasoning=self._reasoning,
            eos_ids=self._ends.eos_ids,
            weight_version=self.weight_version,
            on_step=on_step,
            sync=self._sync,
        )
        try:
            while True:
                loop.refill()
                with self._strategy.borrow(), patches():
                    records = loop.advance()
                if records is None:
                    return
                for record in records:
                    self._lengths.learn(record)
                yield from records
        finally:
            loop.close()
            self.stats = loop.tally.stats(
                peak_kv_bytes=kv.peak_bytes, kv_bytes_held=kv.bytes_held, seconds=time.perf_counter() - start
            )

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt; chat messages go through the chat template, text is used unchanged.

        Raises:
            PromptError: this prompt cannot be encoded.
            InputError: the engine has no tokenizer, or the tokenizer has no chat template for messages.
        """
        return self.encoder.encode(prompt).token_ids


def _describe(strategy: str, attention: str) -> str:
    """Return attention and run strategy in words, e.g. ``compiled attention (packed batches)``."""
    unnamed = {"own": "their own attention", "none": "no attention"}
    return f"{unnamed.get(attention, f'{attention} attention')} ({strategy} batches)"
