"""One worker's way through the shards: claims them, asks for what is missing, and commits them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from jinja2 import TemplateError

from rollout.data.prompts import DatasetRow, Prompt, Prompts
from rollout.job.rewards import Reward, scored
from rollout.length_history import LengthHistory
from rollout.records import Record
from rollout.requests import Request, in_windows
from rollout.run_dir.part_file import PartFile
from rollout.run_dir.run import RunDir
from rollout.run_dir.shard_locks import ShardLocks
from rollout.run_dir.shards import commit
from rollout.sampling_params import SamplingParams

Encode = Callable[[Prompt], list[int]]


@dataclass(frozen=True, slots=True)
class OpenShard:
    """A claimed shard: its rows, and what is there of their samples."""

    index: int
    rows: dict[str, DatasetRow]
    part: PartFile

    def missing(self, row_id: str, samples: int) -> list[int]:
        """Samples of a row that are not there yet."""
        return [sample for sample in range(samples) if (row_id, sample) not in self.part.done]

    def finished(self, samples: int) -> bool:
        return len(self.part.done) == len(self.rows) * samples


class ShardWorker:
    """Feeds the engine from claimed shards, and takes its records back into them.

    Several shards are open at a time: the next one is claimed when the rows of one are all admitted, while the
    last of them are still being decoded, so that the live batch never drains between shards.
    """

    def __init__(
        self,
        run: RunDir,
        claims: ShardLocks,
        prompts: Prompts,
        encode: Encode,
        params: SamplingParams,
        seed: int,
        reward: Reward | None = None,
        former: LengthHistory | None = None,
    ) -> None:
        self._run = run
        self._claims = claims
        self._prompts = prompts
        self._encode = encode
        self._params = params
        self._seed = seed
        self._reward = reward
        self._former = former
        """Lengths that outputs of a former run had."""
        self._claimed: int | None = None
        self._open: dict[int, OpenShard] = {}
        self._shard_of: dict[str, OpenShard] = {}

    def claim(self) -> bool:
        """Claim a shard for `requests` to begin with; False where there is none to claim now."""
        if self._claimed is None:
            self._claimed = self._claims.claim()
        return self._claimed is not None

    def requests(self) -> Iterator[Request]:
        """What the engine should generate, shard after shard, until there is none to claim."""
        while self.claim():
            index, self._claimed = self._claimed, None
            assert index is not None
            requests = self._requests_of(self._opened(index))
            # Where something may be expected of rows, those of a shard are put in order together.
            yield from in_windows(requests, self._run.rows_per_shard) if self._has_expectations else requests

    def take(self, record: Record) -> None:
        """A record that the engine finished: score and keep it, and commit its shard if it was the last one."""
        shard = self._shard_of[record.row_id]
        columns = shard.rows[record.row_id].columns
        shard.part.append(scored(replace(record, attempt=self._run.attempt), columns, self._reward))
        self._commit_if_finished(shard)

    @property
    def samples_in_open_shards(self) -> int:
        """Finished samples that are not in committed shards yet."""
        return sum(len(shard.part.done) for shard in self._open.values())

    def close(self) -> None:
        """Give unfinished shards back; what they have stays in their part files."""
        if self._claimed is not None:
            self._claims.release(self._claimed, committed=False)
        for shard in tuple(self._open.values()):
            shard.part.close()
            self._forget(shard)
            self._claims.release(shard.index, committed=False)

    def _opened(self, index: int) -> OpenShard:
        span = self._run.span(index)
        rows = {row.row_id: row for row in self._prompts.rows(span.start, span.stop)}
        shard = OpenShard(index, rows, PartFile(self._run.paths.part(index)))
        self._open[index] = shard
        self._shard_of.update(dict.fromkeys(rows, shard))
        return shard

    def _requests_of(self, shard: OpenShard) -> Iterator[Request]:
        for row in shard.rows.values():
            missing = shard.missing(row.row_id, self._params.n)
            if not missing:
                continue
            ids, error_class, error = self._encoded(row)
            if error_class:
                for sample in missing:
                    shard.part.append(self._error_record(row.row_id, sample, error_class, error))
            else:
                yield Request(row.row_id, ids, self._params, self._seed, missing, self._expected(row, ids))
        # All its rows may be there already, or in error.
        self._commit_if_finished(shard)

    @property
    def _has_expectations(self) -> bool:
        return self._former is not None or self._prompts.hinted

    def _expected(self, row: DatasetRow, ids: list[int]) -> float | None:
        """The row's own hint, or else what a former run says of its prompt."""
        if row.length_hint is None and self._former is not None:
            return self._former.expected(ids)
        return row.length_hint

    def _encoded(self, row: DatasetRow) -> tuple[list[int], str, str]:
        """Token ids of a row, or the class and words of what is wrong with it."""
        if row.prompt is None:
            return [], row.error_class, row.error
        try:
            return self._encode(row.prompt), "", ""
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            # A chat template may refuse messages, e.g. two of one role in turn; that is this row's matter.
            return [], "bad_prompt", f"The prompt cannot be tokenised: {error}"

    def _error_record(self, row_id: str, sample: int, error_class: str, error: str) -> Record:
        return Record(
            row_id=row_id,
            sample=sample,
            prompt_ids=[],
            completion_ids=[],
            text="",
            logprobs=[],
            sampler_logprobs=[],
            finish_reason="error",
            error_class=error_class,
            error=error,
            seed=self._seed,
            attempt=self._run.attempt,
        )

    def _commit_if_finished(self, shard: OpenShard) -> None:
        if shard.index not in self._open or not shard.finished(self._params.n):
            return
        order = {row_id: position for position, row_id in enumerate(shard.rows)}
        records = sorted(shard.part.records(), key=lambda record: (order[record.row_id], record.sample))
        run = self._run
        commit(run.paths, shard.index, run.format, records, run.fingerprint.digest)
        shard.part.close()
        # Another worker that saw the run complete may have cleared the folder.
        shard.part.path.unlink(missing_ok=True)
        self._forget(shard)
        self._claims.release(shard.index, committed=True)

    def _forget(self, shard: OpenShard) -> None:
        del self._open[shard.index]
        for row_id in shard.rows:
            del self._shard_of[row_id]
