"""The shard worker: claims shards, requests their missing samples, and commits them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa

from rollout.closing import do_all
from rollout.data.prompts import Prompts
from rollout.data.row_params import RowParams
from rollout.job.effort import Effort
from rollout.job.open_shard import OpenShard, OpenShards
from rollout.job.prompt_reader import EncodeRows
from rollout.job.reference import Reference, ReferenceScorer
from rollout.job.rewards import Reward, Scorer
from rollout.job.shard_content import shard_content
from rollout.job.shard_requests import ShardRequests
from rollout.job.sharing import Sharing
from rollout.length_history import LengthHistory
from rollout.progress.progress import Done
from rollout.record_columns import ABSENT_LOGPROBS
from rollout.records import Record
from rollout.requests import Request, StepReport
from rollout.run_dir.claims import ShardClaims
from rollout.run_dir.commit import DamagedPart, commit
from rollout.run_dir.handover import Gift, Handover
from rollout.run_dir.part_file import PartFile
from rollout.run_dir.record_lines import SampleKey
from rollout.run_dir.run import RunDir
from rollout.sampling_params import SamplingParams
from rollout.stop_conditions import Unfinished

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds between two looks for a shard to claim, once none was found; each pause is twice as long as the last."""


class ShardWorker:
    """Feed the engine from claimed shards, and store its records in part files.

    Several shards may be open: the next one is claimed once all samples of the last one are admitted, while they are
    still being decoded, so that the live batch does not drain between shards. Once none is left to claim, samples are
    shared with other workers.

    Args:
        run: the run.
        claims: claims shards for this worker.
        writer: the worker's name in files.
        schema: the columns of the shards.
        executor: commits shards beside the generation.
        previous_lengths: lengths of a previous run's completions.
        on_stored: called with the tokens of each record that is stored, and the seconds that it took.
        publish: makes this worker's load known to the others; None: nothing does.
        effort: counts the time of commits.
    """

    def __init__(
        self,
        *,
        run: RunDir,
        claims: ShardClaims,
        writer: str,
        prompts: Prompts,
        schema: pa.Schema,
        encode: EncodeRows,
        params: SamplingParams,
        executor: Executor,
        row_params: RowParams | None = None,
        seed: int,
        reward: Reward | None = None,
        reference: Reference | None = None,
        previous_lengths: LengthHistory | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_stored: Callable[[int, float], None] | None = None,
        publish: Callable[[dict[str, Any]], None] | None = None,
        effort: Effort | None = None,
    ) -> None:
        self._run = run
        self._claims = claims
        self._writer = writer
        self._prompts = prompts
        self._schema = schema
        self._absent: dict[str, Any] = {name: [] for name in ABSENT_LOGPROBS["none"] if name not in schema.names}
        self._params = params
        self._executor = executor
        self._clock = clock
        self._row_params = RowParams(params, columns={}) if row_params is None else row_params
        self._scorer = Scorer(reward)
        self._reference = ReferenceScorer(reference)
        self._on_stored = on_stored
        self._requests = ShardRequests(
            run=run,
            prompts=prompts,
            encode=encode,
            row_params=self._row_params,
            seed=seed,
            previous_lengths=previous_lengths,
            store=self._append,
        )
        self._open = OpenShards(run, prompts, params.n)
        self._handover = Handover(run.files, run.paths, self._writer)
        self._sharing = Sharing(
            shards=self._open,
            handover=self._handover,
            workers=claims.workers,
            claims=claims,
            publish=publish or _keep,
            clock=clock,
        )
        self._effort = effort or Effort()
        self._removals: deque[Future[None]] = deque()
        """Part files of committed shards that are being removed."""
        self._claimed: int | None = None
        """A shard that is claimed but not open yet."""
        self._taken: deque[OpenShard] = deque()
        """Shards of which this worker has been given samples that it has not asked the engine for."""
        self._in_engine = 0
        """Samples that the engine has been asked for and has given no record of."""
        self._pause = FIRST_PAUSE
        self._next_claim = 0.0

    def claim(self) -> bool:
        """Claim the next shard for `requests`; return False if none can be claimed now."""
        self._settle()
        if self._claimed is None:
            self._claimed = self._claims.claim()
        self._sharing.may_claim = self._claimed is not None
        return self._claimed is not None

    def take(self) -> bool:
        """Take samples for `requests` that other workers give, or did not finish; return False if there are none."""
        for shard in self._sharing.gather():
            self._commit_if_finished(shard)
        self._taken += self._sharing.returned
        self._sharing.returned.clear()
        if not self._taken:
            for gift in self._sharing.take(idle=not self._in_engine):
                self._open_gift(gift)
        return bool(self._taken)

    @property
    def waits_for_others(self) -> bool:
        """Whether other workers have samples of shards that this one has claimed."""
        return self._sharing.has_given

    def requests(self) -> Iterator[Request | None]:
        """Yield the missing samples' requests, shard after shard; None while none can be had but may later."""
        while True:
            shard = self._next_shard()
            if shard is not None:
                for request in self._requests.of(shard):
                    self._in_engine += len(request.wanted_samples)
                    yield request
                # Its samples may all have been finished by an earlier attempt, or have errors.
                self._commit_if_finished(shard)
            elif self._in_engine:
                yield None
            else:
                return

    def _next_shard(self) -> OpenShard | None:
        """Return the next shard with samples to ask the engine for; look for one at a pace."""
        if self._claimed is None and self._clock() >= self._next_claim:
            self._pause = FIRST_PAUSE if self.claim() else min(2 * self._pause, LONGEST_PAUSE)
            self._next_claim = 0.0 if self._claimed is not None else self._clock() + self._pause
        if self._claimed is not None:
            index, self._claimed = self._claimed, None
            return self._open_claimed(index)
        return self._taken.popleft() if self._taken or self.take() else None

    def withdrawn(self, unfinished: Unfinished) -> Collection[tuple[str, int]]:
        """Return the samples that the engine is to give back: others have room for them, or have finished them."""
        done: set[SampleKey] = set()
        for shard in self._sharing.gather():
            self._commit_if_finished(shard)
            done |= shard.requested & shard.parts.finished.keys()
        return done.union(self._sharing.chosen(unfinished))

    def step(self, report: StepReport) -> None:
        """Learn from a step of the engine how fast this worker is."""
        self._sharing.step(report)

    def accept(self, record: Record) -> list[Record]:
        """Score and store a record, and commit its shard if it is complete.

        Of a sample that was stopped, the tokens so far are stored; it goes on there.

        Returns:
            The records that are stored now: none while a batch of rewards, or of the reference model, fills.
        """
        self._settle()
        self._in_engine -= 1
        shard = self._open.of(record.row_id)
        if record.finish_reason == "abort":
            if record.completion_ids:
                self._append(shard, replace(record, attempt=self._run.attempt))
            key = SampleKey(record.row_id, record.sample)
            shard.requested.discard(key)
            self._sharing.left(shard, key, finished=False)
            self._commit_if_finished(shard)
            return []
        columns = shard.rows[record.row_id].columns
        stored = replace(record, attempt=self._run.attempt, **self._absent)
        return self._refer(self._scorer.add(stored, columns))

    def flush(self) -> list[Record]:
        """Score and store the records that wait for a batch of rewards or of the reference model, and return them."""
        stored = self._refer(self._scorer.flush())
        return [*stored, *self._store(self._reference.flush())]

    def wait_for_commits(self) -> None:
        """Wait until the shards that are complete are committed."""
        self._settle(wait=True)

    def _refer(self, records: list[Record]) -> list[Record]:
        """Store the records that the reference model has scored, and return them."""
        passed: list[Record] = []
        for record in records:
            params = self._row_params.of(self._open.of(record.row_id).rows[record.row_id].columns)
            passed += self._reference.add(record, params.temperature)
        # All are stored or wait before the reference model runs, which may be interrupted.
        stored = self._store(passed)
        return [*stored, *self._store(self._reference.flush())] if self._reference.full else stored

    def _store(self, records: list[Record]) -> list[Record]:
        for record in records:
            shard = self._open.of(record.row_id)
            self._append(shard, record)
            self._commit_if_finished(shard)
        return records

    def _append(self, shard: OpenShard, record: Record) -> None:
        if shard.part is None:
            run = self._run
            shard.part = PartFile(run.files, run.paths, self._open.key(shard.index), self._writer, self._clock)
        begun = time.perf_counter()
        location = shard.part.append(record)
        if self._on_stored is not None:
            self._on_stored(len(record.completion_ids), time.perf_counter() - begun)
        sample = SampleKey(record.row_id, record.sample)
        if record.finish_reason == "abort":
            shard.parts.under_way[sample] = record
        else:
            shard.parts.finished[sample] = location
            shard.parts.under_way.pop(sample, None)
            shard.requested.discard(sample)
            self._sharing.left(shard, sample, finished=True)

    @property
    def under_way(self) -> int:
        """Samples of the open shards that were stopped and go on later."""
        return sum(len(shard.parts.under_way) for shard in self._open)

    def done(self, workers: int) -> Done:
        """Count the finished samples of the run, and those that the other of so many workers are expected to do."""
        run = self._run
        claimed = [shard for shard in self._open if shard.owned]
        own = sum(len(shard.parts.finished) for shard in claimed)
        committed = run.committed() - {shard.index for shard in claimed}
        others = 0.0
        finished = run.samples_of(committed)
        if workers > 1:
            begun = run.begun() - committed - self._claims.held
            unclaimed = run.samples * run.rows - finished - run.samples_of(begun | self._claims.held)
            others = run.samples_of(begun) + max(0, unclaimed) * (workers - 1) / workers
        return Done(own, finished, workers, others)

    def close(self) -> None:
        """Finish commits and release unfinished shards; their finished records stay in the part files."""
        do_all(
            self.flush,
            lambda: self._settle(wait=True),
            lambda: do_all(*(partial(self._close, shard) for shard in self._open)),
            self._sharing.withdraw,
            self._claims.close,
        )

    def _open_claimed(self, index: int) -> OpenShard:
        shard = self._open.get(index)
        if shard is None:
            return self._open.open(index, owned=True)
        # Another worker had given this one some of its samples, and lost the claim.
        self._open.read_on(shard)
        shard.owned, shard.all_read = True, False
        return shard

    def _open_gift(self, gift: Gift) -> None:
        shard = self._open.get(gift.shard)
        known = 0 <= gift.shard < self._run.shards
        manifest = self._run.paths.manifest(gift.shard)
        if not known or (shard is not None and shard.owned) or self._run.files.exists(manifest):
            # Nobody waits for it.
            self._handover.finish(gift)
            return
        if shard is None:
            shard = self._open.open(gift.shard, owned=False)
        else:
            self._open.read_on(shard)
        shard.gifts.append(gift)
        shard.all_read = False
        self._taken.append(shard)

    def _commit_if_finished(self, shard: OpenShard) -> None:
        # A sample that another worker has finished as well may still be in the engine.
        if shard not in self._open or shard.committing or shard.requested or not shard.finished():
            return
        if not shard.owned:
            self._close(shard)
            return
        run = self._run
        content = shard_content(run, self._prompts, shard.index, list(shard.rows), shard.parts.finished)
        shard.committing = self._executor.submit(self._effort.commit, commit, run, content, self._schema, self._writer)

    def _settle(self, wait: bool = False) -> None:
        """Close the shards that are committed now, or, to wait, all that are to be."""
        for shard in self._open:
            if shard.committing is None or not (wait or shard.committing.done()):
                continue
            try:
                shard.committing.result()
            except DamagedPart as damaged:
                logger.warning("Shard %d: %s; their samples are generated again.", shard.index, damaged)
                self._close(shard)
            else:
                self._effort.committed(shard.index, time.monotonic() - shard.opened_at)
                self._close(shard)
                # Off the loop: removing some 100 MB may take as long as many steps.
                parts = self._run.paths.parts(shard.index)
                self._removals.append(self._executor.submit(self._run.files.remove_folder, parts))
            self._claims.release(shard.index)
        while self._removals and (wait or self._removals[0].done()):
            self._removals.popleft().result()

    def _close(self, shard: OpenShard) -> None:
        self._open.close(shard)
        # Once their records are flushed.
        for gift in shard.gifts:
            self._handover.finish(gift)


def _keep(load: dict[str, Any]) -> None:
    """Tell nobody about a load."""
