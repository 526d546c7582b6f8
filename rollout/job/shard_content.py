"""What is committed of a shard: its samples in order, where their records stand, and the input's columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rollout.data.prompts import Prompts
from rollout.run_dir.commit import ShardContent
from rollout.run_dir.part_file import Location
from rollout.run_dir.record_lines import SampleKey
from rollout.run_dir.record_table import KeptRows
from rollout.run_dir.run import RunDir


def shard_content(
    run: RunDir, prompts: Prompts, shard: int, row_ids: Sequence[str], finished: Mapping[SampleKey, Location]
) -> ShardContent:
    """Return the content of a shard of which all samples are finished.

    Args:
        row_ids: of its input rows, in order.
        finished: where the record of each sample stands.
    """
    indices = run.shard_rows(shard)
    keys = [SampleKey(row_id, sample) for row_id in row_ids for sample in range(run.samples)]
    kept = KeptRows(
        table=prompts.kept.table(indices.start, indices.stop),
        indices=[number // run.samples for number in range(len(keys))],
    )
    return ShardContent(shard, keys, dict(finished), kept)
