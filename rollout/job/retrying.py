"""Set the records of a run that are in error open again, so that a job generates or scores them anew."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pyarrow as pa

from rollout.data.prompts import Prompts
from rollout.errors import InputError
from rollout.job.reference import reference_failure, with_reference_failure
from rollout.job.rewards import Reward, Scorer
from rollout.job.shard_content import shard_content
from rollout.records import Record
from rollout.run_dir.commit import DamagedPart, commit
from rollout.run_dir.part_file import ShardKey, read_parts
from rollout.run_dir.record_lines import SampleKey
from rollout.run_dir.reopening import reopen
from rollout.run_dir.run import RunDir
from rollout.run_dir.shards import read_manifest
from rollout.run_dir.stored_records import stored_records

logger = logging.getLogger(__name__)

_REWARD_FAILED = "reward_failed"


class Opened(NamedTuple):
    """A run that a job is about to go on with."""

    run: RunDir
    prompts: Prompts
    schema: pa.Schema
    """The columns of the shards."""
    reward: Reward | None


@dataclass
class Retry:
    """The errors to retry.

    Args:
        classes: of the errors; None: all.
    """

    classes: Collection[str] | None = None
    shards: int = 0
    """Committed shards that had such errors."""
    generated: int = 0
    """Records that are to be generated again."""
    scored: int = 0
    """Records of which only the reward was computed again."""

    def prepare(self, opened: Opened) -> None:
        """Open the shards with such errors again. Those that a new reward makes complete are committed at once.

        A record whose reward alone failed keeps its completion; all others are left out of their shards, so that the
        job generates them.
        """
        run, writer = opened.run, f"retry-{secrets.token_hex(4)}"
        scorer = Scorer(opened.reward)
        for shard in sorted(run.committed()):
            if not self._has_errors(run, shard):
                continue
            before = self.generated, self.scored
            try:
                reopen(run, shard, self._kept(opened, shard, scorer), writer)
            except FileNotFoundError:
                # A job sets it aside, and goes on with it where the records to keep are.
                logger.debug("The file of shard %d is gone.", shard)
                self.generated, self.scored = before
            except ValueError as error:
                logger.warning("Shard %d is not retried (%s): output.check=full generates it again.", shard, error)
                self.generated, self.scored = before
            else:
                self.shards += 1
                if self.generated == before[0]:
                    self._commit(opened, shard, writer)
        logger.info("%s", self._sentence(run))

    def _has_errors(self, run: RunDir, shard: int) -> bool:
        try:
            errors = read_manifest(run.paths.manifest(shard), run.files).errors
        except InputError:
            # Damaged or gone: a job sees to that.
            return False
        return any(self._wanted(error_class) for error_class in errors)

    def _wanted(self, error_class: str) -> bool:
        return bool(error_class) and (self.classes is None or error_class in self.classes)

    def _kept(self, opened: Opened, shard: int, scorer: Scorer) -> Iterator[Record]:
        """Yield the records of a shard that need not be generated again, with new rewards where these failed."""
        run = opened.run
        indices = run.shard_rows(shard)
        path = run.paths.shard(shard, run.format)
        failures: dict[SampleKey, str] = {}
        columns = None
        for record in stored_records(path, list(run.columns), run.files):
            if not self._wanted(record.error_class):
                yield record
            elif record.error_class != _REWARD_FAILED or record.finish_reason == "error":
                self.generated += 1
            else:
                if columns is None:
                    columns = {row.row_id: row.columns for row in opened.prompts.rows(indices.start, indices.stop)}
                self.scored += 1
                failures[SampleKey(record.row_id, record.sample)] = reference_failure(record.error_class, record.error)
                unscored = replace(record, error_class="", error="")
                yield from (_with(failures, scored) for scored in scorer.add(unscored, columns[record.row_id]))
        yield from (_with(failures, scored) for scored in scorer.flush())

    def _commit(self, opened: Opened, shard: int, writer: str) -> None:
        """Commit a shard that lacks nothing, without a model."""
        run = opened.run
        indices = run.shard_rows(shard)
        finished = read_parts(run.files, run.paths, ShardKey(run.fingerprint.digest, shard)).finished
        row_ids = list(opened.prompts.row_ids.within(indices.start, indices.stop))
        content = shard_content(run, opened.prompts, shard, row_ids, finished)
        try:
            commit(run, content, opened.schema, writer)
        except (KeyError, DamagedPart) as error:
            logger.warning("Shard %d cannot be committed at once (%r): the job does it.", shard, error)
        else:
            run.files.remove_folder(run.paths.parts(shard))

    def _sentence(self, run: RunDir) -> str:
        named = "" if self.classes is None else f" of the class {' or '.join(sorted(self.classes))}"
        if not self.shards:
            return f"The run in {run.paths.root} has no records in error{named}."
        done = [
            *([f"{self.generated:,} are generated again"] if self.generated else []),
            *([f"{self.scored:,} were scored again"] if self.scored else []),
        ]
        return f"Of the records in error{named}, in {self.shards:,} shards, {' and '.join(done)}."


def _with(failures: dict[SampleKey, str], record: Record) -> Record:
    """Return a scored record, which the reference model may have failed to score."""
    failure = failures[SampleKey(record.row_id, record.sample)]
    return with_reference_failure(record, failure) if failure else record
