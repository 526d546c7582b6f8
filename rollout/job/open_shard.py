"""The shards that a worker has open, and what is known of their samples."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout.data.dataset_row import DatasetRow
from rollout.data.prompts import Prompts
from rollout.records import Record
from rollout.run_dir.handover import Gift
from rollout.run_dir.part_file import PartFile, ShardKey, ShardParts, add_parts, read_on
from rollout.run_dir.record_lines import SampleKey
from rollout.run_dir.run import RunDir
from rollout.run_dir.shards import Manifest

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class OpenShard:
    """A shard that this worker has claimed, or of which another one has given it samples."""

    index: int
    rows: dict[str, DatasetRow]
    """Its input rows by id."""
    samples: int
    """Samples of each row."""
    parts: ShardParts
    owned: bool = True
    """Whether this worker has claimed it, and commits it."""
    gifts: list[Gift] = field(default_factory=list)
    """What others have given this worker of it."""
    requested: set[SampleKey] = field(default_factory=set)
    """Samples that the engine has been asked for and that are not stored."""
    given: dict[SampleKey, Any] = field(default_factory=dict)
    """Samples that another worker has, or is about to get, and in which gift."""
    all_read: bool = False
    """Whether the engine has been asked for all samples that are this worker's to do."""
    part: PartFile | None = None
    """This worker's own part file; None before its first record."""
    read_to: dict[Path, int] = field(default_factory=dict)
    """How far the part files of others have been read."""
    committing: Future[Manifest] | None = None
    opened_at: float = field(default_factory=time.monotonic)

    def missing(self, row_id: str) -> list[int]:
        """Return the samples of an input row that this worker has to ask for."""
        keys = (SampleKey(row_id, sample) for sample in range(self.samples))
        known = (self.parts.finished, self.requested, self.given)
        return [key.sample for key in keys if self.wants(key) and not any(key in keys for keys in known)]

    def unread(self) -> list[SampleKey]:
        """Return all samples that this worker has to ask for, the last in front."""
        if self.all_read:
            return []
        return [SampleKey(row_id, sample) for row_id in reversed(self.rows) for sample in self.missing(row_id)[::-1]]

    def wants(self, key: SampleKey) -> bool:
        """Return whether this worker is to see a sample done."""
        return self.owned or any(key in gift.samples for gift in self.gifts)

    def finished(self) -> bool:
        """Return whether all samples are finished that this worker is to see done."""
        if self.owned:
            return len(self.parts.finished) == len(self.rows) * self.samples
        return all(gift.samples <= self.parts.finished.keys() for gift in self.gifts)

    def under_way(self, row_id: str, samples: list[int]) -> dict[int, Record]:
        """Return the records of stopped samples that go on, by sample."""
        found = ((sample, self.parts.under_way.get(SampleKey(row_id, sample))) for sample in samples)
        return {sample: record for sample, record in found if record is not None}


class OpenShards:
    """The open shards of one worker, by index and by input row."""

    def __init__(self, run: RunDir, prompts: Prompts, samples: int) -> None:
        self._run = run
        self._prompts = prompts
        self._samples = samples
        self._open: dict[int, OpenShard] = {}
        self._of_row: dict[str, OpenShard] = {}

    def __iter__(self) -> Iterator[OpenShard]:
        return iter(tuple(self._open.values()))

    def __contains__(self, shard: OpenShard) -> bool:
        return self._open.get(shard.index) is shard

    def of(self, row_id: str) -> OpenShard:
        """Return the shard of an input row."""
        return self._of_row[row_id]

    def get(self, index: int) -> OpenShard | None:
        """Return an open shard, None if it is not open."""
        return self._open.get(index)

    def key(self, index: int) -> ShardKey:
        """Return what part files of a shard are bound to."""
        return ShardKey(self._run.fingerprint.digest, index)

    def open(self, index: int, *, owned: bool) -> OpenShard:
        """Open a shard with what all part files hold of it."""
        indices = self._run.shard_rows(index)
        rows = {row.row_id: row for row in self._prompts.rows(indices.start, indices.stop)}
        shard = OpenShard(index, rows, self._samples, ShardParts({}, {}), owned=owned)
        self.read_on(shard)
        self._open[index] = shard
        self._of_row.update(dict.fromkeys(rows, shard))
        return shard

    def read_on(self, shard: OpenShard) -> None:
        """Read what other writers have added to a shard's part files."""
        run = self._run
        found = ShardParts({}, {})
        own = None if shard.part is None else shard.part.path
        read_on(run.files, run.paths, self.key(shard.index), found, shard.read_to, without=own)
        for key in [*found.finished, *found.under_way]:
            if key.row_id not in shard.rows or key.sample not in range(self._samples):
                logger.warning("Part files of shard %d hold %s sample %d, which it does not have.", shard.index, *key)
                found.finished.pop(key, None)
                found.under_way.pop(key, None)
        add_parts(shard.parts, found)

    def close(self, shard: OpenShard) -> None:
        """Forget a shard; its part file is flushed."""
        del self._open[shard.index]
        for row_id in shard.rows:
            del self._of_row[row_id]
        if shard.part is not None:
            shard.part.close()
