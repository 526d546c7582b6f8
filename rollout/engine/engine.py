"""The library: generate with a live transformers module."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from rollout.batcher.types import Bounds, Policy
from rollout.engine.generation import Generation
from rollout.engine.kept_memory import KeptMemory
from rollout.engine.library_calls import CallArguments, LibraryCalls, Params, Prompts
from rollout.engine.live_module import LiveModule
from rollout.engine.model_arguments import check_model_arguments
from rollout.engine.option_arguments import check_options, given_policy
from rollout.engine.score_arguments import given_pairs
from rollout.engine.scoring import Scoring
from rollout.engine_arguments import argument_checks
from rollout.errors import check_all
from rollout.headroom.headroom import Headroom, after_reserve, headroom_for, headroom_over, memory_name
from rollout.models.attention.names import AUTO
from rollout.models.module.inspect import output_device, unwrap_model
from rollout.records import Batch, Record
from rollout.requests import Request, StepReport
from rollout.sampling_params import SamplingParams
from rollout.scores import Scores
from rollout.stats import Stats
from rollout.stop_conditions import StopConditions, StopWhen
from rollout.tokenization.prompt import AddSpecialTokens, EncodingOptions, Prompt, Tool
from rollout.tokenization.prompt_encoder import PromptEncoder
from rollout.tracking.call_tracker import start_tracker

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from rollout import Session

logger = logging.getLogger(__name__)

#: Most of a GPU's memory that captured graphs hold between calls, as a share: 0.3 GB of 80.
_GRAPHS_SHARE = 1 / 256


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
        keep_prefixes_bytes: KV bytes that may stay in memory after a call, for later prompts that begin with the same
            tokens, while the weights stay as they are; `release` frees them. 0: none.
        attention: name of a backend (`rollout.models.attention.names`); ``auto``: the engine's fastest for this model.
        batch_invariant: give a row the same bits whatever else is in its steps, and refuse a model or a device that
            cannot. On a GPU, linear layers then run in a kernel of the engine's that is slower than cuBLAS.
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
        InputError: an argument is out of range, or the tokenizer is of another model.
    """

    _kept: KeptMemory | None = None
    """Where rows leave their KV for later calls; a session has it, and an engine that keeps prefixes."""

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
        keep_prefixes_bytes: int = 0,
        attention: str = AUTO,
        batch_invariant: bool = False,
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
                keep_prefixes_bytes=keep_prefixes_bytes,
                attention=attention,
            )
        )
        check_model_arguments(model, tokenizer)
        check_options(
            headroom=headroom,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            tools=tools,
            has_tokenizer=tokenizer is not None,
            flags={
                "skip_special_tokens": skip_special_tokens,
                "split_reasoning": split_reasoning,
                "batch_invariant": batch_invariant,
            },
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
        self._module = LiveModule(
            model,
            attention,
            lambda: after_reserve(headroom or headroom_for(output_device(model)), reserve_fraction),
            batch_invariant=batch_invariant,
        )
        strategy = self._module.strategy
        layout = self._module.layout()
        self.attention = strategy.attention(layout)
        """Attention backend: triton, compiled or gather; varlen or flash_attn for prefills, then + and the backend for
        decoding; own: the model's code; none: the model has no attention."""
        logger.debug("Running the model's own modules with %s.", _describe(strategy.name, self.attention))
        shares = layout.shares(self._module.device) or {self._module.device: 1.0}
        self.memory = memory_name(shares)
        """The memory that holds the KV cache, as `memory_name` names it."""
        if headroom is None:
            headroom = headroom_over(shares, reserve_fraction)
        headroom = self._module.sync.headroom(headroom)
        bounds = Bounds(min_rows=min_rows, max_rows=max_rows, latency_budget_ms=latency_budget_ms)
        self._generation = Generation(
            self._module,
            tokenizer,
            given_policy(policy, bounds),
            headroom,
            max_kv_bytes=max_kv_bytes,
            reserve_fraction=reserve_fraction,
            latency_budget_ms=latency_budget_ms,
            skip_special_tokens=skip_special_tokens,
            split_reasoning=split_reasoning,
        )
        sessions = self._generation.sessions
        graph_bytes = int(_GRAPHS_SHARE * headroom.total_bytes) if self._module.may_keep_graphs else 0
        if keep_prefixes_bytes or graph_bytes:
            self._kept = KeptMemory(keep_prefixes_bytes, graph_bytes)
            sessions.add(self._kept)
        self._scoring = Scoring(
            self._module, headroom, sessions, max_kv_bytes=max_kv_bytes, reserve_fraction=reserve_fraction
        )
        self.context_limit = self._generation.context_limit
        """Maximum tokens of prompt and completion together; None if the model states no limit."""
        name = getattr(unwrap_model(model).config, "name_or_path", "")
        self._calls = LibraryCalls(
            self._module,
            self._generation,
            self.encoder,
            start_tracker(tracker, self, {"model": name, "attention": self.attention}),
        )

    @property
    def weight_version(self) -> int:
        """Version of the weights, stamped on every token drawn with them.

        The engine looks at the weights when a call begins and when a stream is resumed, and adds 1 if they have
        changed. Set it to give a change a number of your own: the engine then does not add to it for that change.
        """
        return self._module.version.number

    @weight_version.setter
    def weight_version(self, version: int) -> None:
        self._module.version.number = version

    def weights_changed(self) -> None:
        """Tell the engine of a change that no look at some elements of the weights can see.

        It is needed only for changes of few elements, or of what is no tensor. When the next call begins or the stream
        is resumed, the engine drops all that it keeps of the weights and computes live rows anew.
        """
        self._module.declare_changed()

    def release(self) -> None:
        """Free what the engine keeps for the next call: prefixes, CUDA graphs, and copies of weights.

        It makes the last two again.
        """
        if self._kept is not None:
            self._kept.release()
        self._module.drop_copies()

    @property
    def stats(self) -> Stats | None:
        """Totals of the last call that finished or was closed early."""
        return self._generation.stats

    @property
    def undelivered(self) -> tuple[Record, ...]:
        """What the last call made and did not deliver, since its stream was closed or an exception ended it.

        Finished records, and an abort record of every other sample read so far; ``resume=engine.undelivered`` goes on.
        Empty after a call that ended by itself. Prompts that had not been read are not among them.
        """
        return self._generation.undelivered

    def generate(
        self,
        prompts: Prompts = (),
        params: Params = None,
        *,
        seed: int = 0,
        row_ids: Iterable[str | int] | None = None,
        attention_mask: Any = None,
        progress: bool = False,
        stop_when: StopWhen = None,
        resume: Iterable[Record] | None = None,
        exact: bool | int = False,
    ) -> Batch:
        """Generate completions of all prompts; records come in prompt order, then sample order.

        A prompt that cannot be used is an error record, and the others are unaffected. A call that an exception ends,
        such as KeyboardInterrupt, leaves what it made in `undelivered`.

        Args:
            prompts: texts, chat message lists, token-id lists, rows of a dataset with a column ``prompt``, or a
                tokenizer's output. A single one is one prompt. Ids may be tensors or arrays, [B, P] with a mask.
            params: one for all prompts, or one per prompt: `SamplingParams`, mappings of its fields, or transformers'
                ``GenerationConfig``.
            seed: the noise of a token depends only on the seed, the row id, the sample and the position.
            row_ids: one string or whole number per prompt that keys its noise; by default the prompt's index.
            attention_mask: [B, P], 0 where the ids in ``prompts`` are padding.
            progress: draw a bar on stderr or in the notebook; of several ranks, only the first draws.
            stop_when: ends the call, or a prompt's samples, early: a `Deadline`, a `FinishedPerPrompt`, a function of
                `CallProgress`, or several. The rest comes back as records with the finish reason ``abort``, with what
                they have; samples that were still waiting have no tokens.
            resume: a batch, or records, whose abort records are continued; the others are returned unchanged. They come
                before the new prompts. ``params`` count from a completion's first token, so they are those of the first
                call; of a list, the first entries are the resumed prompts'. In fp32, tokens are those of an
                uninterrupted call while the weights are unchanged.
            exact: replace ``logprobs`` by those of the module's own forward over padded micro-batches in record order:
                of so many rows, or of all in one if True (`rollout.engine.exact`).

        Raises:
            InputError: an argument has no form that can be read, lists differ in length, or ids repeat.
        """
        arguments = CallArguments(prompts, params, seed, row_ids, attention_mask, progress, stop_when, resume)
        return self._calls.generate(arguments, exact=exact, kept=self._kept)

    def stream(
        self,
        prompts: Prompts = (),
        params: Params = None,
        *,
        seed: int = 0,
        row_ids: Iterable[str | int] | None = None,
        attention_mask: Any = None,
        progress: bool = False,
        stop_when: StopWhen = None,
        resume: Iterable[Record] | None = None,
    ) -> Generator[Record, None, None]:
        """Generate like `generate`, but yield records as they finish and read ``prompts`` only as rows are admitted.

        ``close()`` ends the call early, and `undelivered` has the rest. A condition of ``stop_when`` that ends the call
        leaves an iterator of prompts where it is; of a sequence, the rest becomes abort records.

        If ``prompts`` is a sequence, up to 4096 of them are ordered together by the lengths that earlier calls
        observed, so that long completions start early.
        """
        arguments = CallArguments(prompts, params, seed, row_ids, attention_mask, progress, stop_when, resume)
        return self._calls.stream(arguments, kept=self._kept)

    def score(
        self,
        prompt_ids: Prompts | Batch | Iterable[Record],
        completion_ids: Iterable[Any] | None = None,
        *,
        temperature: float | Sequence[float] = 1.0,
    ) -> Scores:
        """Return the log-probabilities of given completions under the module's weights as they are now.

        Many pairs share a forward, and a prompt that pairs share is computed once. A pair that cannot be scored has an
        error, and the others are unaffected.

        Args:
            prompt_ids: prompts in any form of `generate`, one for each completion; or a `Batch` or records, which hold
                their own completions.
            completion_ids: one per prompt: token ids, as lists, arrays or tensors without padding, or texts, to which
                no special token is added, none at the end either.
            temperature: as in `Record.logprobs`: log-probabilities are those of ``logits / temperature``, or of the raw
                logits at 0. One for all pairs, or one for each.

        Raises:
            InputError: an argument has no form that can be read, or lists differ in length.
            UnsupportedModel: the model's active PEFT adapter cannot be served.
        """
        return self._scoring.run(given_pairs(prompt_ids, completion_ids, temperature, self.encoder))

    @property
    def scoring_bytes(self) -> int:
        """Memory in bytes that a call of `score` takes beside the weights, for pairs of up to 8,192 tokens."""
        return self._scoring.working_bytes

    def check_params(self, params: SamplingParams) -> None:
        """Refuse parameters that do not suit the model and its tokenizer.

        Raises:
            InputError: the message begins with the parameter's name.
        """
        self._calls.check_params(params)

    def run(
        self,
        requests: Iterable[Request | None],
        *,
        on_step: Callable[[StepReport], None] | None = None,
        stop: StopConditions | None = None,
        weights_fixed: bool = False,
    ) -> Generator[Record, None, None]:
        """Generate for a stream of requests and yield records as they finish.

        The module is borrowed only while steps run, so between records it is as its owner left it.

        Args:
            requests: the stream. None in it says that there is no request at this time, and more may come: it is asked
                again some steps later. It must end, or have a request, once all of its samples have their records.
            on_step: called with a report of every step.
            stop: ends samples, prompts, or the call, early, with abort records. Once the call ends, requests that have
                not been read stay unread.
            weights_fixed: the caller leaves the weights as they are until the call ends, so they are looked at only
                when it begins.

        Raises:
            UnsupportedModel: the model's active PEFT adapter cannot be served.
        """
        return self._generation.run(
            requests, on_step=on_step, stop=stop, reads_all=False, kept=self._kept, weights_fixed=weights_fixed
        )

    def session(self) -> Session:
        """Return a `Session`: its calls keep the KV of their rows for later rows that continue them."""
        from rollout import Session  # an engine itself, which imports this module

        return Session(self)

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
