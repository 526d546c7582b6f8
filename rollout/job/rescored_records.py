"""The columns of a record that its reward decides, computed anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rollout.job.reference import reference_failure, with_reference_failure
from rollout.job.rewards import Scorer
from rollout.records import Record
from rollout.run_dir.shards import CountedRecords, RecordCounts

READ = ("row_id", "sample", "text", "finish_reason", "error_class", "error")
"""The columns that `RecordRescorer.change` reads."""


class RecordRescorer:
    """Scores the records of one shard, as a job does.

    Args:
        rows: the columns of the input rows, by their ids.
        referred: whether the run has a reference model, whose failures stand in the errors of records.
    """

    def __init__(self, scorer: Scorer, rows: Mapping[str, dict[str, Any]], referred: bool) -> None:
        self._scorer = scorer
        self._rows = rows
        self._referred = referred
        self._counted = CountedRecords()

    def change(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the columns of records that depend on the reward."""
        scored: dict[tuple[str, int], Record] = {}
        for values in records:
            record = Record(
                row_id=values["row_id"],
                sample=values["sample"],
                prompt_ids=[],
                completion_ids=[],
                text=values["text"],
                logprobs=[],
                sampler_logprobs=[],
                finish_reason=values["finish_reason"],
            )
            if record.finish_reason in ("error", "abort"):  # what a job does not score
                record = replace(record, error_class=values["error_class"], error=values["error"])
            scored |= _by_key(self._scorer.add(record, self._rows[record.row_id]))
        scored |= _by_key(self._scorer.flush())
        return [self._columns(scored[values["row_id"], values["sample"]], values) for values in records]

    def counts(self, earlier: RecordCounts) -> RecordCounts:
        """Return the counts of the changed records.

        Args:
            earlier: those of the shard as it was, whose tokens stay.
        """
        counts = self._counted.counts()
        return replace(counts, prompt_tokens=earlier.prompt_tokens, completion_tokens=earlier.completion_tokens)

    def _columns(self, record: Record, earlier: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns of a scored record; what the reference model failed at stands in the earlier ones."""
        failure = reference_failure(earlier["error_class"], earlier["error"]) if self._referred else ""
        if failure and record.finish_reason not in ("error", "abort"):
            record = with_reference_failure(record, failure)
        self._counted.add([record])
        return {"error_class": record.error_class, "error": record.error, "reward": record.reward}


def _by_key(records: list[Record]) -> dict[tuple[str, int], Record]:
    return {(record.row_id, record.sample): record for record in records}
