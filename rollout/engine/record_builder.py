"""Build the records of finished samples, and count them."""

from __future__ import annotations

from rollout.engine.batch_row import NO_COMPLETION, Completion
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
        weight_version: stamped on every record.
    """

    def __init__(
        self, detokenizer: Detokenizer, tally: Tally, weight_version: int, reasoning: ReasoningSplitter | None = None
    ) -> None:
        self._detokenizer = detokenizer
        self._reasoning = reasoning
        self._tally = tally
        self._weight_version = weight_version
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
            self.fail(request, sample, NO_COMPLETION, error_class=error_class, error=error)

    def fail(self, request: Request, sample: int, completion: Completion, error_class: str, error: str) -> None:
        """Add the error record of a sample that cannot continue, with the tokens it has."""
        self._tally.error_samples += 1
        self._add(request, sample, completion, "error", error_class=error_class, error=error)

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
        self._tally.output_tokens += len(completion)
        ids = completion.tokens.tolist()
        parts = self._parts(request, ids)
        self._records.append(
            Record(
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
                weight_version=self._weight_version,
                reasoning=parts.reasoning,
                row=request.row,
            )
        )

    def _parts(self, request: Request, ids: list[int]) -> CompletionText:
        if not ids:
            return CompletionText("", "")  # the ids of a rejected prompt may be none that can be decoded
        prompt_ids, stops, after = request.prompt_ids, request.params.stop, request.params.min_new_tokens
        # Reasoning is not searched for the one stop string that ended it, so with a minimum it is kept whole.
        parts = None if self._reasoning is None else self._reasoning.split(prompt_ids, ids, () if after else stops)
        return parts or CompletionText("", self._detokenizer.before_stop(prompt_ids, ids, stops, after))
