"""The shard worker: claims shards, requests their missing samples, and commits them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from rollout.data.dataset_row import DatasetRow
from rollout.data.prompts import Prompts
from rollout.data.row_params import RowParams
from rollout.errors import PromptError
from rollout.job.rewards import Reward, Scorer
from rollout.length_history import LengthHistory
from rollout.progress.progress import Done
from rollout.record_columns import ABSENT_LOGPROBS
from rollout.records import Record
from rollout.requests import Request, in_windows, turn_ends
from rollout.run_dir.part_file import PartFile, SampleKey
from rollout.run_dir.record_table import KeptRows
from rollout.run_dir.run import RunDir
from rollout.run_dir.shard_locks import ShardLocks
from rollout.run_dir.shards import commit
from rollout.sampling_params import SamplingParams
from rollout.tokenization.prompt import EncodedPrompt, Prompt

Encode = Callable[[Prompt], EncodedPrompt]


@dataclass(frozen=True, slots=True)
class OpenShard:
    """A claimed shard: its input rows by id, and the part file with the samples finished so far."""

    index: int
    rows: dict[str, DatasetRow]
    part: PartFile

    def missing(self, row_id: str, samples: int) -> list[int]:
        """Return the samples of an input row that are not finished."""
        return [sample for sample in range(samples) if SampleKey(row_id, sample) not in self.part.done]

    def finished(self, samples: int) -> bool:
        """Return whether all samples of all input rows are finished."""
        return len(self.part.done) == len(self.rows) * samples


class ShardWorker:
    """Feed the engine from claimed shards, and store its records in their part files.

    Several shards may be open: the next one is claimed once all samples of the last one are admitted, while they are
    still being decoded, so that the live batch does not drain between shards.
    """

    def __init__(
        self,
        *,
        run: RunDir,
        locks: ShardLocks,
        prompts: Prompts,
        schema: pa.Schema,
        encode: Encode,
        params: SamplingParams,
        row_params: RowParams | None = None,
        seed: int,
        reward: Reward | None = None,
        previous_lengths: LengthHistory | None = None,
    ) -> None:
        self._run = run
        self._locks = locks
        self._prompts = prompts
        self._schema = schema
        """The columns of the shards."""
        self._absent: dict[str, Any] = {name: [] for name in ABSENT_LOGPROBS["none"] if name not in schema.names}
        self._encode = encode
        self._params = params
        self._row_params = RowParams(params, columns={}) if row_params is None else row_params
        self._seed = seed
        self._scorer = Scorer(reward)
        self._previous_lengths = previous_lengths
        """Lengths of a previous run's completions."""
        self._claimed: int | None = None
        """A shard that is claimed but not open yet."""
        self._open: dict[int, OpenShard] = {}
        self._shard_of: dict[str, OpenShard] = {}

    def claim(self) -> bool:
        """Claim the next shard for `requests`; return False if none can be claimed now."""
        if self._claimed is None:
            self._claimed = self._locks.claim()
        return self._claimed is not None

    def requests(self) -> Iterator[Request]:
        """Yield the missing samples' requests, shard after shard, until none can be claimed."""
        while self.claim():
            index, self._claimed = self._claimed, None
            assert index is not None
            requests = self._shard_requests(self._open_shard(index))
            if self._has_expectations:
                # The engine orders the prompts of a window by their expected lengths.
                requests = in_windows(requests, self._run.rows_per_shard)
            yield from requests

    def accept(self, record: Record) -> list[Record]:
        """Score and store a finished record, and commit its shard if it is complete.

        Returns:
            The records that are stored now: none while a batch of rewards fills.
        """
        shard = self._shard_of[record.row_id]
        columns = shard.rows[record.row_id].columns
        stored = replace(record, attempt=self._run.attempt, **self._absent)
        return self._store(self._scorer.add(stored, columns))

    def flush(self) -> list[Record]:
        """Score and store the records that wait for a batch of rewards, and return them."""
        return self._store(self._scorer.flush())

    def _store(self, records: list[Record]) -> list[Record]:
        for record in records:
            shard = self._shard_of[record.row_id]
            shard.part.append(record)
            self._commit_if_finished(shard)
        return records

    def done(self, workers: int) -> Done:
        """Count the finished samples of the run, and those that the other of so many workers are expected to do."""
        run = self._run
        own = sum(len(shard.part.done) for shard in self._open.values())
        committed, begun = run.committed_samples(), run.begun_samples()
        others = 0.0
        if workers > 1:
            mine = run.samples_of({*self._open, *([] if self._claimed is None else [self._claimed])})
            unclaimed = run.samples * run.rows - committed - begun
            others = max(0, begun - mine) + max(0, unclaimed) * (workers - 1) / workers
        return Done(own, committed, workers, others)

    def close(self) -> None:
        """Release unfinished shards; their finished records stay in the part files."""
        self.flush()
        if self._claimed is not None:
            self._locks.release(self._claimed, committed=False)
        for shard in tuple(self._open.values()):
            shard.part.close()
            self._forget(shard)
            self._locks.release(shard.index, committed=False)

    def _open_shard(self, index: int) -> OpenShard:
        indices = self._run.shard_rows(index)
        rows = {row.row_id: row for row in self._prompts.rows(indices.start, indices.stop)}
        shard = OpenShard(index=index, rows=rows, part=PartFile(self._run.paths.part(index)))
        self._open[index] = shard
        self._shard_of.update(dict.fromkeys(rows, shard))
        return shard

    def _shard_requests(self, shard: OpenShard) -> Iterator[Request]:
        """Yield requests for a shard's missing samples; store error records for prompts that cannot be encoded."""
        for row in shard.rows.values():
            missing = shard.missing(row.row_id, self._params.n)
            if not missing:
                continue
            try:
                params = self._row_params.of(row.columns)
                encoded = self._encode_prompt(row)
            except PromptError as error:
                for sample in missing:
                    shard.part.append(self._error_record(row.row_id, sample, error))
            else:
                yield Request(
                    row_id=row.row_id,
                    prompt_ids=encoded.token_ids,
                    params=params,
                    seed=self._seed,
                    samples=missing,
                    end_ids=turn_ends(encoded.turn_end_ids, params),
                    expected_tokens=self._expected_tokens(row, encoded.token_ids),
                )
        # Its samples may all have been finished by an earlier attempt, or have errors.
        self._commit_if_finished(shard)

    @property
    def _has_expectations(self) -> bool:
        return self._previous_lengths is not None or self._prompts.hinted

    def _expected_tokens(self, row: DatasetRow, token_ids: list[int]) -> float | None:
        """Return the input row's own length hint, or else the mean length of its prompt in the previous run."""
        if row.length_hint is None and self._previous_lengths is not None:
            return self._previous_lengths.expected(token_ids)
        return row.length_hint

    def _encode_prompt(self, row: DatasetRow) -> EncodedPrompt:
        if row.prompt is None:
            raise PromptError(row.error_class, row.error)
        return self._encode(row.prompt)

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

    def _commit_if_finished(self, shard: OpenShard) -> None:
        if shard.index not in self._open or not shard.finished(self._params.n):
            return
        records = sorted(shard.part.records(), key=lambda record: (shard.rows[record.row_id].index, record.sample))
        run = self._run
        indices = run.shard_rows(shard.index)
        kept = KeptRows(
            table=self._prompts.kept.table(indices.start, indices.stop),
            indices=[shard.rows[record.row_id].index - indices.start for record in records],
        )
        digest = run.fingerprint.digest
        commit(run.paths, shard.index, run.format, records, digest, schema=self._schema, kept=kept)
        shard.part.close()
        # Another worker that saw the run complete may have removed the folder.
        shard.part.path.unlink(missing_ok=True)
        self._forget(shard)
        self._locks.release(shard.index, committed=True)

    def _forget(self, shard: OpenShard) -> None:
        del self._open[shard.index]
        for row_id in shard.rows:
            del self._shard_of[row_id]
