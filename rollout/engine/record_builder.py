"""Build the records of finished samples, and count them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rollout.engine.batch_row import Completion, completion_before
from rollout.engine.detokenizer import Detokenizer
from rollout.engine.reasoning import CompletionText, ReasoningSplitter
from rollout.records import FinishReason, Record
from rollout.requests import Request
from rollout.stats import Tally


class RecordBuilder:
    """Collects records until they are taken.

    Args:
        detokenizer: decodes completions.
        reasoning: tells reasoning from text; None: all is text.
        tally: counters to update.
        weight_version: of the weights in force, for records without tokens.
        counted: called with each sample that gets its record.
        on_record: called with every record and its request.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        tally: Tally,
        weight_version: int,
        reasoning: ReasoningSplitter | None = None,
        counted: Callable[[Request, FinishReason], None] | None = None,
        on_record: Callable[[Request, Record], None] | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._reasoning = reasoning
        self._tally = tally
        self.weight_version = weight_version
        """Version of the weights in force."""
        self._counted = counted
        self._on_record = on_record
        self._records: list[Record] = []

    def __bool__(self) -> bool:
        return bool(self._records)

    def take(self) -> list[Record]:
        """Return the records added since the last call."""
        taken, self._records = self._records, []
        return taken

    def finish(self, request: Request, sample: int, completion: Completion, reason: FinishReason) -> None:
        """Add the record of a completion that ended at a stop or at its length limit."""
        self._add(request, sample, completion, reason)

    def reject(self, request: Request, error_class: str, error: str) -> None:
        """Add an error record for every sample of an invalid request."""
        for sample in request.wanted_samples:
            before = completion_before(request, sample)
            self.fail(request, sample, before, error_class=error_class, error=error)

    def fail(self, request: Request, sample: int, completion: Completion, error_class: str, error: str) -> None:
        """Add the error record of a sample that cannot continue, with the tokens it has."""
        self._tally.error_samples += 1
        self._add(request, sample, completion, "error", error_class=error_class, error=error)

    def abort(self, request: Request, sample: int, completion: Completion) -> None:
        """Add the record of a sample that was ended before it finished, perhaps before its first token."""
        self._tally.aborted_samples += 1
        self._add(request, sample, completion, "abort")

    def _add(
        self,
        request: Request,
        sample: int,
        completion: Completion,
        finish_reason: FinishReason,
        error_class: str = "",
        error: str = "",
    ) -> None:
        self._tally.samples += 1
        self._tally.prompt_tokens += len(request.prompt_ids)
        before = request.resumed.get(sample)
        self._tally.output_tokens += len(completion) - (0 if before is None else len(before.completion_ids))
        mass = np.exp(completion.logprobs.astype(np.float64) - completion.sampler_logprobs)
        if np.isfinite(mass).all():
            self._tally.kept_mass += float(mass.sum())
            self._tally.massed_tokens += len(mass)
        ids, versions = completion.tokens.tolist(), completion.weight_versions.tolist()
        parts = self._parts(request, ids)
        record = Record(
            row_id=request.row_id,
            sample=sample,
            prompt_ids=list(request.prompt_ids),
            completion_ids=ids,
            text=parts.text,
            logprobs=completion.logprobs.tolist(),
            sampler_logprobs=completion.sampler_logprobs.tolist(),
            finish_reason=finish_reason,
            error_class=error_class,
            error=error,
            seed=request.seed,
            weight_version=versions[-1] if versions else self.weight_version,
            weight_versions=versions,
            reasoning=parts.reasoning,
            row=request.row,
            end_ids=list(request.end_ids) if finish_reason == "abort" else [],
        )
        self._records.append(record)
        if self._counted is not None:
            self._counted(request, finish_reason)
        if self._on_record is not None:
            self._on_record(request, record)

    def _parts(self, request: Request, ids: list[int]) -> CompletionText:
        if not ids:
            return CompletionText("", "")  # the ids of a rejected prompt may be none that can be decoded
        prompt_ids, stops, after = request.prompt_ids, request.params.stop, request.params.min_new_tokens
        # Reasoning is not searched for the one stop string that ended it, so with a minimum it is kept whole.
        parts = None if self._reasoning is None else self._reasoning.split(prompt_ids, ids, () if after else stops)
        return parts or CompletionText("", self._detokenizer.before_stop(prompt_ids, ids, stops, after))
