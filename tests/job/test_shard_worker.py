"""The shard worker: what it counts as done, and as the work of others."""

from __future__ import annotations

from pathlib import Path

from rollout.config.schema import Config
from rollout.data.prompts import Prompts, read_prompts
from rollout.job.shard_worker import ShardWorker
from rollout.progress.progress import Done
from rollout.record_columns import SCHEMA
from rollout.run_dir.fingerprint import Fingerprint
from rollout.run_dir.run import RunDir, open_run, prepare_folder
from rollout.run_dir.shard_locks import FileLocks
from rollout.tokenization.prompt import EncodedPrompt
from tests.support.jobs import config_of, record_of


def test_worker_counts_what_others_have_begun_and_will_take(tmp_path: Path) -> None:
    config = config_of(tmp_path, "data.limit=10", "sampling.n=2", "output.rows_per_shard=1")
    prompts = read_prompts(config.data)
    run = open_run(
        prepare_folder(config.output.dir),
        config,
        Fingerprint({}),
        prompts.row_ids,
        dtype="float32",
        attention="gather",
        workers=2,
        template_dates={},
    )
    first, other = (worker_of(run, prompts, config) for _ in range(2))
    assert first.claim()
    assert other.claim()
    # Two shards of two samples are begun, and half of the other eight are for the other worker.
    assert first.done(workers=2) == Done(own=0, committed=0, workers=2, others=2 + 8)
    assert first.done(workers=1) == Done(own=0, committed=0, workers=1, others=0)
    request = next(first.requests())
    first.accept(record_of(request, 0))
    assert first.done(workers=2) == Done(own=1, committed=0, workers=2, others=2 + 8)
    first.accept(record_of(request, 1))
    assert first.done(workers=2) == Done(own=0, committed=2, workers=2, others=2 + 8)
    first.close()
    other.close()


def worker_of(run: RunDir, prompts: Prompts, config: Config) -> ShardWorker:
    return ShardWorker(
        run=run,
        locks=FileLocks(run.paths, run.shards, workers=2),
        prompts=prompts,
        schema=SCHEMA,
        encode=lambda prompt: EncodedPrompt([1]),
        params=config.sampling.params(),
        seed=0,
    )
