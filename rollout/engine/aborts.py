"""Abort rows wherever they are: those that a stop condition ends, or all when a call is abandoned."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rollout.batcher.types import IntArray
from rollout.engine.early_stop import EarlyStop
from rollout.engine.live_batch import LiveBatch
from rollout.engine.record_builder import RecordBuilder
from rollout.engine.scheduler import Scheduler
from rollout.engine.waiting_queue import WaitingQueue
from rollout.records import Record
from rollout.stats import Tally
from rollout.stop_conditions import UnfinishedSample


class Aborts:
    """Makes abort records of live and waiting rows.

    Args:
        queue: has the waiting rows, and knows all that have no record.
        records: where records go.
        tally: totals of the call.
        early_stop: says which rows are to be aborted; None: none.
    """

    def __init__(
        self,
        queue: WaitingQueue,
        records: RecordBuilder,
        tally: Tally,
        early_stop: EarlyStop | None,
    ) -> None:
        self._queue = queue
        self._records = records
        self._tally = tally
        self._early_stop = early_stop

    def unwanted(self, scheduler: Scheduler, settle: Callable[[], object]) -> None:
        """Abort the rows that a stop condition ends, and free their pages.

        Args:
            scheduler: has the live rows.
            settle: reads pending tokens; rows may finish with their last ones.
        """
        stop, queue = self._early_stop, self._queue
        unfinished = partial(self._unfinished, scheduler.live)
        if stop is None or not stop.look(self._tally, scheduler.alive, len(queue), unfinished):
            return
        settle()
        if stop.call_ends and not stop.reads_all:
            queue.stop_reading()
        for row in [*scheduler.withdraw(stop.ends), *queue.withdraw(stop.ends)]:
            self._records.abort(row.request, row.sample, row.completion)
            del queue.unfinished[row]

    def _unfinished(self, live: LiveBatch) -> list[UnfinishedSample]:
        slots = {live.row(slot): slot for slot in live.active.tolist()}
        return [
            UnfinishedSample(
                row_id=row.request.row_id,
                sample=row.sample,
                prompt_tokens=len(row.group.prompt_ids),
                generated_tokens=int(live.generated[slots[row]]) if row in slots else len(row.completion),
                max_new_tokens=row.limit,
                computed=row in slots,
            )
            for row in self._queue.unfinished
        ]

    def everything(self, live: LiveBatch, unchecked: IntArray) -> list[Record]:
        """Return the records that nobody has taken, and an abort record of every row that has none.

        This may be called after an exception in the midst of a step. Sampled tokens that have not been read are left
        out: a row that is resumed draws them again.

        Args:
            live: the live rows.
            unchecked: slots whose last received token may end their row; it is left out as well.
        """
        slots = {live.row(slot): slot for slot in live.occupied.tolist()}
        records = self._records.take()
        recorded = {(record.seed, record.row_id, record.sample) for record in records}
        for row in self._queue.unfinished:
            if (*row.request.key, row.sample) in recorded:
                continue
            completion = row.completion
            if row in slots:
                completion = live.completion(slots[row], without_last=slots[row] in unchecked)
            self._records.abort(row.request, row.sample, completion)
        return [*records, *self._records.take()]
