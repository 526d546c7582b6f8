"""Read the lengths of a previous run's completions from its directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from rollout.batcher.types import IntArray
from rollout.errors import InputError
from rollout.length_history import LengthHistory
from rollout.run_dir.file_system import LOCAL
from rollout.run_dir.part_file import ShardKey, begun_shards, finished_records
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import read_run
from rollout.run_dir.shard_batches import read_batches
from rollout.run_dir.shards import read_manifest


def read_lengths(folder: str) -> LengthHistory:
    """Read the lengths of all finished completions of a run, complete or not.

    Raises:
        InputError: the folder holds no run, or one of its shards cannot be read.
    """
    paths = RunPaths(Path(folder).expanduser())
    if not paths.run.exists():
        raise InputError(
            f"data.lengths_from={folder} holds no run: it has no run.json; give the output.dir of an earlier run."
        )
    lengths = LengthHistory()
    for manifest in sorted(paths.shards.glob("*.json")):
        shard = paths.shards / read_manifest(manifest).file
        try:
            for table in read_batches(shard, ["prompt_ids", "completion_ids", "finish_reason"]):
                for prompt_ids, tokens in _completions(table):
                    lengths.add(prompt_ids, tokens)
        except ValueError as error:
            raise InputError(f"data.lengths_from={folder}: {shard} cannot be read: {error}.") from error
    digest = read_run(paths).fingerprint.digest
    for index in begun_shards(LOCAL, paths):
        for record in finished_records(LOCAL, paths, ShardKey(digest, index)):
            lengths.learn(record)
    return lengths


def _completions(table: pa.Table) -> Iterator[tuple[IntArray, int]]:
    """Yield the prompt's token ids and the completion's length of each record without an error."""
    table = table.filter(pc.field("finish_reason") != "error").combine_chunks()
    prompts = table.column("prompt_ids").combine_chunks()
    lengths = pc.list_value_length(table.column("completion_ids")).to_pylist()
    ids, offsets = prompts.values.to_numpy(zero_copy_only=False), prompts.offsets.to_pylist()
    for start, stop, length in zip(offsets, offsets[1:], lengths, strict=False):
        yield ids[start:stop], length
