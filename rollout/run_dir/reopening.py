"""Set committed shards open again, keeping the records that are good."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from rollout.records import Record
from rollout.run_dir.part_file import PartFile, ShardKey
from rollout.run_dir.run import RunDir

logger = logging.getLogger(__name__)


def reopen(run: RunDir, shard: int, kept: Iterable[Record], writer: str) -> None:
    """Replace a committed shard by a part file with some of its records; the others are missing then.

    At every moment the records to keep stand in the shard, or flushed in the part file. If it is killed in between, a
    job finds either a committed shard, or one whose file is gone, which it sets aside to go on from the part file.

    Args:
        kept: the records to keep; read before anything of the shard is moved.
        writer: names the part file.

    Raises:
        FileNotFoundError: the shard's file is gone, so its records are in part files, if anywhere; nothing has changed.
    """
    files, paths = run.files, run.paths
    path = paths.shard(shard, run.format)
    if not files.exists(path):
        raise FileNotFoundError(path)
    # What attempts left of it there has the other records as well.
    files.remove_folder(paths.parts(shard))
    part = PartFile(files, paths, ShardKey(run.fingerprint.digest, shard), writer)
    try:
        for record in kept:
            part.append(record)
    finally:
        part.close()
    files.make_folder(paths.reopened)
    # The file first: a manifest without its file is damage, while a file without a manifest could be taken for good.
    for old in (path, paths.manifest(shard)):
        try:
            files.rename(old, paths.reopened / f"{writer}-{old.name}")
        except FileNotFoundError:
            logger.debug("%s was moved by another worker.", old)
    files.sync_folder(paths.shards)
