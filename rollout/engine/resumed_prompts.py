"""Continue abort records: which prompts and samples they are of, and whether they can go on."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np

from rollout.engine.detokenizer import Detokenizer
from rollout.errors import InputError, shorten
from rollout.length_history import LengthHistory
from rollout.records import Record
from rollout.requests import PromptKey, Request, turn_ends
from rollout.sampling_params import SamplingParams

SampleKey = tuple[int, str, int]
"""Seed, row id and index of a sample."""


@dataclass(frozen=True, slots=True)
class ResumedPrompt:
    """The records of one prompt that a caller resumes."""

    key: PromptKey
    aborted: dict[int, Record] = field(default_factory=dict)
    """Records to continue, by sample."""
    ended: list[Record] = field(default_factory=list)
    """Records that are returned unchanged: finished ones and errors."""


def resumed_prompts(resume: Any) -> list[ResumedPrompt]:
    """Return the prompts of the records that a caller resumes, in order of their first record.

    Args:
        resume: a `Batch`, or any records; None: none.

    Raises:
        InputError: something else is given, a sample stands twice, a record has not one log-probability per token, or
            records of one prompt differ in their prompts.
    """
    prompts: dict[PromptKey, ResumedPrompt] = {}
    seen: set[tuple[PromptKey, int]] = set()
    for record in _records(resume):
        key = PromptKey(record.seed, record.row_id)
        name = f"sample {record.sample} of row {shorten(record.row_id, 60)!r} with seed {record.seed}"
        if (key, record.sample) in seen:
            raise InputError(f"resume has {name} twice: give each sample once.")
        seen.add((key, record.sample))
        prompt = prompts.setdefault(key, ResumedPrompt(key))
        if record.finish_reason != "abort":
            prompt.ended.append(record)
            continue
        for column in ("logprobs", "sampler_logprobs", "weight_versions"):
            tokens, numbers = len(record.completion_ids), len(getattr(record, column))
            if tokens != numbers:
                raise InputError(
                    f"resume has {name} with {tokens} tokens, but {numbers} {column}: give records as the engine "
                    "returned them."
                )
        for other in prompt.aborted.values():
            if other.prompt_ids != record.prompt_ids:
                raise InputError(
                    f"resume has samples {other.sample} and {record.sample} of row {shorten(record.row_id, 60)!r} with "
                    f"seed {record.seed}, but their prompts differ."
                )
        prompt.aborted[record.sample] = record
    return list(prompts.values())


def _records(resume: Any) -> Iterable[Record]:
    if resume is None:
        return ()
    given = [resume] if isinstance(resume, Record) or not isinstance(resume, Iterable) else list(resume)
    for record in given:
        if not isinstance(record, Record):
            raise InputError(f"resume has {shorten(repr(record), 60)}, but must be a Batch, or records of one.")
    return given


def resumed_requests(
    prompts: Iterable[ResumedPrompt], params: Iterator[SamplingParams], lengths: LengthHistory
) -> Iterator[Request]:
    """Yield a request per prompt for the samples to continue; ``params`` has an entry for each of ``prompts``.

    A row's token ids, seed and row id are its records', so that its noise goes on where it stopped.
    """
    for prompt in prompts:
        own = next(params)
        if prompt.aborted:
            first = next(iter(prompt.aborted.values()))
            yield Request(
                row_id=prompt.key.row_id,
                prompt_ids=tuple(first.prompt_ids),
                params=own,
                seed=prompt.key.seed,
                samples=sorted(prompt.aborted),
                expected_tokens=lengths.expected(first.prompt_ids),
                row=first.row,
                end_ids=turn_ends(tuple(first.end_ids), own),
                resumed=prompt.aborted,
                finished_before=sum(record.finished for record in prompt.ended),
            )


class Undelivered(Protocol):
    """Where a call leaves the records that it could not deliver; `Generation`."""

    undelivered: tuple[Record, ...]


def continued(
    resumed: Sequence[ResumedPrompt], records: Generator[Record, None, None], left: Undelivered
) -> Generator[Record, None, None]:
    """Yield the resumed records that have ended, then those of the call.

    Those that it has not come to when it is closed, or when an exception ends it, stay undelivered too.
    """
    if not resumed:
        yield from records
        return
    left.undelivered = ()
    ended = [record for prompt in resumed for record in prompt.ended]
    aborted = [record for prompt in resumed for record in prompt.aborted.values()]
    delivered: list[SampleKey] = []
    try:
        for record in chain(ended, records):
            # No statement stands between taking a record and yielding it: an interrupt there would lose it.
            try:
                yield record
            finally:
                delivered.append((record.seed, record.row_id, record.sample))
    except BaseException:
        records.close()
        _leave(ended + aborted, delivered, left)
        raise


def _leave(records: Iterable[Record], delivered: Iterable[SampleKey], left: Undelivered) -> None:
    """Leave those records that are neither delivered nor left yet."""
    known = {*delivered, *((record.seed, record.row_id, record.sample) for record in left.undelivered)}
    rest = [record for record in records if (record.seed, record.row_id, record.sample) not in known]
    left.undelivered = (*left.undelivered, *rest)


def unlike_resumed(row_ids: Iterable[str], seed: int, resumed: Iterable[ResumedPrompt]) -> Iterator[str]:
    """Yield the ids of new prompts.

    Raises:
        InputError: an id is that of a resumed prompt with the same seed.
    """
    taken = {prompt.key.row_id for prompt in resumed if prompt.key.seed == seed}
    for row_id in row_ids:
        if row_id in taken:
            raise InputError(
                f"Row {shorten(row_id, 60)!r} with seed {seed} is both resumed and a new prompt: give the new prompts "
                "another seed, or other row_ids."
            )
        yield row_id


class ResumeCheck:
    """Refuses samples that cannot go on as their parameters say; they keep their tokens, in an error record.

    Args:
        detokenizer: finds stop strings.
        eos_ids: end-of-sequence ids of the model.
        vocab_size: token ids must be below this.
        context_limit: maximum tokens of prompt and completion together; None: no limit.
    """

    def __init__(
        self, detokenizer: Detokenizer, eos_ids: Sequence[int], vocab_size: int, context_limit: int | None
    ) -> None:
        self._detokenizer = detokenizer
        self._eos_ids = eos_ids
        self._vocab_size = vocab_size
        self._context_limit = context_limit

    def applied(self, requests: Iterable[Request | None]) -> Iterator[Request | None]:
        """Yield the requests; samples that are refused stand in one of their own."""
        for request in requests:
            if request is None:
                yield None
                continue
            refused = {}
            for sample, record in request.resumed.items():
                if why := self._refusal(request, record):
                    refused[sample] = why
            for sample, why in refused.items():
                yield replace(request, samples=(sample,), error_class="bad_resume", error=why)
            kept = [sample for sample in request.wanted_samples if sample not in refused]
            if kept or not refused:
                yield replace(request, samples=kept) if refused else request

    def _refusal(self, request: Request, record: Record) -> str:
        """Return why a record cannot be continued, or an empty string."""
        params, ids = request.params, np.array(record.completion_ids, np.int64)
        if not len(ids):
            return ""
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            return f"The completion to resume has token ids outside of the vocabulary of {self._vocab_size}."
        limit = params.max_new_tokens
        if self._context_limit is not None:
            limit = min(limit, self._context_limit - len(request.prompt_ids))
        if len(ids) >= limit:
            return (
                f"The completion to resume has {len(ids)} tokens and may have {limit} in all: max_new_tokens counts "
                "those of earlier calls."
            )
        ends = {*params.stop_token_ids, *request.end_ids, *(() if params.ignore_eos else self._eos_ids)}
        if np.isin(ids, list(ends)).any() or self._has_stop_string(request, ids.tolist()):
            return "The completion to resume already ends by these parameters: give those that it was begun with."
        return ""

    def _has_stop_string(self, request: Request, ids: list[int]) -> bool:
        stops = request.params.stop
        if not stops:
            return False
        decoder, prompt_ids = self._detokenizer, request.prompt_ids
        cut = decoder.before_stop(prompt_ids, ids, stops, request.params.min_new_tokens)
        return len(cut) < len(decoder.before_stop(prompt_ids, ids, ()))
