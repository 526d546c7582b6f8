"""What `Engine.generate` and `Engine.stream` do with their arguments: requests in, records out."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from typing import Any

from transformers import GenerationConfig

from rollout.engine.call_requests import call_requests
from rollout.engine.exact import ExactPass
from rollout.engine.generation import Generation, OnRecord
from rollout.engine.kept_memory import KeptMemory
from rollout.engine.live_module import LiveModule
from rollout.engine.observed_call import observed_call
from rollout.engine.option_arguments import flag_checks
from rollout.engine.params_arguments import given_params
from rollout.engine.prompt_arguments import GivenPrompt, given_prompts, given_row_ids, given_seed
from rollout.engine.recommendations import Recommendations
from rollout.engine.resumed_prompts import ResumedPrompt, continued, resumed_prompts, resumed_requests, unlike_resumed
from rollout.errors import check_all
from rollout.models.module.inspect import unwrap_model
from rollout.records import Batch, Record
from rollout.requests import PromptKey, Request, in_windows
from rollout.sampling_params import SamplingParams
from rollout.stop_conditions import StopWhen, given_conditions
from rollout.tokenization.prompt_encoder import PromptEncoder
from rollout.tracking.call_tracker import LogLine

#: Prompts of a sequence that are ordered together.
_WINDOW = 1 << 12

Prompts = Iterable[Any]
"""Prompts in any form of `rollout.engine.prompt_arguments`."""
Params = SamplingParams | Mapping[str, Any] | Iterable[SamplingParams | Mapping[str, Any]] | GenerationConfig | None


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The arguments of `Engine.stream`, as they are given."""

    prompts: Prompts
    params: Params
    seed: int
    row_ids: Iterable[str | int] | None
    attention_mask: Any
    progress: bool
    stop_when: StopWhen
    resume: Iterable[Record] | None


class LibraryCalls:
    """Checks the arguments of a call, makes requests of them, and runs these.

    Args:
        module: the live module.
        generation: runs requests.
        encoder: turns prompts into token ids.
        log_line: logs a line of metrics; None: none are made.
    """

    def __init__(
        self,
        module: LiveModule,
        generation: Generation,
        encoder: PromptEncoder,
        log_line: LogLine | None,
    ) -> None:
        self._module = module
        self._generation = generation
        self._encoder = encoder
        self._log_line = log_line
        self._recommendations = Recommendations(unwrap_model(module.model).generation_config)

    def generate(self, arguments: CallArguments, *, exact: bool | int, kept: KeptMemory | None) -> Batch:
        """See `Engine.generate`."""
        exactly = ExactPass(self._module, self._generation.pad_id, exact, self._generation.sessions)
        resumed = resumed_prompts(arguments.resume)
        given = list(given_prompts(arguments.prompts, arguments.attention_mask, self._encoder.pad_id))
        ids = list(map(str, range(len(given))))
        if arguments.row_ids is not None:
            ids = list(islice(given_row_ids(arguments.row_ids, given), len(given)))
        seed = given_seed(arguments.seed)
        keys = chain((prompt.key for prompt in resumed), (PromptKey(seed, row_id) for row_id in ids))
        order = {key: i for i, key in enumerate(keys)}
        records: list[Record] = []
        try:
            stream = self._stream(
                given,
                ids,
                resumed,
                replace(arguments, seed=seed),
                kept=kept,
                on_record=exactly.note,
                weights_fixed=True,
            )
            with closing(stream):
                for record in stream:
                    records.append(record)
            records.sort(key=lambda record: (order[PromptKey(record.seed, record.row_id)], record.sample))
            stats = self._generation.stats
            assert stats is not None
            return Batch(records=tuple(exactly.applied(records)), stats=stats)
        except BaseException:
            self._generation.undelivered = (*records, *self._generation.undelivered)
            raise

    def stream(self, arguments: CallArguments, *, kept: KeptMemory | None) -> Generator[Record, None, None]:
        """See `Engine.stream`."""
        given = given_prompts(arguments.prompts, arguments.attention_mask, self._encoder.pad_id)
        ids = (str(i) for i in count()) if arguments.row_ids is None else given_row_ids(arguments.row_ids, given)
        return self._stream(given, ids, resumed_prompts(arguments.resume), arguments, kept=kept)

    def check_params(self, params: SamplingParams) -> None:
        """See `Engine.check_params`."""
        self._generation.vocabulary.read().rules.compile(params)

    def _stream(
        self,
        given: Iterable[GivenPrompt],
        row_ids: Iterable[str],
        resumed: Sequence[ResumedPrompt],
        arguments: CallArguments,
        *,
        kept: KeptMemory | None,
        on_record: OnRecord | None = None,
        weights_fixed: bool = False,
    ) -> Generator[Record, None, None]:
        """Check what can be checked now, and return the records of the call; ``weights_fixed`` as in `Generation.run`.

        Args:
            given, row_ids, resumed: the prompts of ``arguments``.
        """
        check_all(flag_checks({"progress": arguments.progress}))
        conditions, seed, params = given_conditions(arguments.stop_when), given_seed(arguments.seed), arguments.params
        if isinstance(params, SamplingParams):
            self.check_params(params)
            self._recommendations.report(params)
        both = [*resumed, *given] if isinstance(given, Sequence) else chain(resumed, given)
        each = given_params(params, both)
        first = list(islice(each, len(resumed)))
        each = (conditions.checked(one) for one in each)
        row_ids = unlike_resumed(row_ids, seed, resumed)
        total = None
        if isinstance(given, Sequence):  # what is wrong with any is said before anything runs
            listed, row_ids = list(islice(each, len(given))), list(islice(row_ids, len(given)))
            total = sum(one.n for one in listed) + sum(len(prompt.aborted) for prompt in resumed)
            each = iter(listed)
        lengths = self._generation.lengths
        requests: Iterator[Request] = chain(
            resumed_requests(resumed, iter(first), lengths),
            call_requests(given, each, seed, iter(row_ids), encoder=self._encoder, lengths=lengths),
        )
        if isinstance(given, Sequence) and lengths:
            requests = in_windows(requests, _WINDOW)
        run = partial(
            self._generation.run,
            stop=conditions,
            reads_all=isinstance(given, Sequence),
            on_record=on_record,
            kept=kept,
            weights_fixed=weights_fixed,
        )
        progress = arguments.progress and not int(os.environ.get("RANK") or 0)
        if not progress and self._log_line is None:
            records = run(requests)
        else:
            records = observed_call(
                run,
                requests,
                total=total,
                progress=progress,
                log_line=self._log_line,
                stats=lambda: self._generation.stats,
            )
        return continued(resumed, records, self._generation)
