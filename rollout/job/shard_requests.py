"""Requests for the samples of a shard that a worker has to generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rollout.data.dataset_row import DatasetRow
from rollout.data.prompts import Prompts
from rollout.data.row_params import RowParams
from rollout.errors import PromptError
from rollout.job.open_shard import OpenShard
from rollout.job.prompt_reader import EncodeRows
from rollout.length_history import LengthHistory
from rollout.records import Record
from rollout.requests import Request, in_windows, turn_ends
from rollout.run_dir.record_lines import SampleKey
from rollout.run_dir.run import RunDir


class ShardRequests:
    """Makes requests from input rows.

    Args:
        store: stores an error record of a prompt that cannot be encoded.
        previous_lengths: lengths of a previous run's completions.
    """

    def __init__(
        self,
        *,
        run: RunDir,
        prompts: Prompts,
        encode: EncodeRows,
        row_params: RowParams,
        seed: int,
        previous_lengths: LengthHistory | None,
        store: Callable[[OpenShard, Record], None],
    ) -> None:
        self._run = run
        self._encode = encode
        self._row_params = row_params
        self._seed = seed
        self._previous_lengths = previous_lengths
        self._has_expectations = previous_lengths is not None or prompts.hinted
        self._store = store

    def of(self, shard: OpenShard) -> Iterator[Request]:
        """Yield requests for the samples of a shard that are missing, each when it is asked for."""
        requests = self._requests(shard)
        # The engine orders the prompts of a window by their expected lengths.
        return in_windows(requests, self._run.rows_per_shard) if self._has_expectations else requests

    def _requests(self, shard: OpenShard) -> Iterator[Request]:
        for row, encoded in self._encode([row for row in shard.rows.values() if shard.missing(row.row_id)]):
            # Others may have finished or been given some since.
            if not (missing := shard.missing(row.row_id)):
                continue
            try:
                params = self._row_params.of(row.columns)
                if isinstance(encoded, PromptError):
                    raise encoded
            except PromptError as error:
                for sample in missing:
                    self._store(shard, self._error_record(row.row_id, sample, error))
            else:
                shard.requested.update(SampleKey(row.row_id, sample) for sample in missing)
                yield Request(
                    row_id=row.row_id,
                    prompt_ids=encoded.token_ids,
                    params=params,
                    seed=self._seed,
                    samples=missing,
                    resumed=shard.under_way(row.row_id, missing),
                    end_ids=turn_ends(encoded.turn_end_ids, params),
                    expected_tokens=self._expected_tokens(row, encoded.token_ids),
                )
        shard.all_read = True

    def _expected_tokens(self, row: DatasetRow, token_ids: list[int]) -> float | None:
        """Return the input row's own length hint, or else the mean length of its prompt in the previous run."""
        if row.length_hint is None and self._previous_lengths is not None:
            return self._previous_lengths.expected(token_ids)
        return row.length_hint

    def _error_record(self, row_id: str, sample: int, error: PromptError) -> Record:
        return Record(
            row_id=row_id,
            sample=sample,
            prompt_ids=[],
            completion_ids=[],
            text="",
            logprobs=[],
            sampler_logprobs=[],
            finish_reason="error",
            error_class=error.error_class,
            error=str(error),
            seed=self._seed,
            attempt=self._run.attempt,
        )
