"""The shard worker: what it counts as done, and as the work of others."""

from __future__ import annotations

from pathlib import Path

from rollout.data.prompts import read_prompts
from rollout.progress.progress import Done
from rollout.run_dir.fingerprint import Fingerprint
from rollout.run_dir.run import open_run, prepare_folder
from tests.support.jobs import config_of, record_of, shard_worker


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
        token="one",
    )
    first, other = (shard_worker(run, prompts, config, rank=rank, workers=2) for rank in range(2))
    assert first.claim()
    assert other.claim()
    # Two shards of two samples are begun, and half of the other eight are for the other worker.
    assert first.done(workers=2) == Done(own=0, committed=0, workers=2, others=2 + 8)
    assert first.done(workers=1) == Done(own=0, committed=0, workers=1, others=0)
    request = next(first.requests())
    first.accept(record_of(request, 0))
    assert first.done(workers=2) == Done(own=1, committed=0, workers=2, others=2 + 8)
    first.accept(record_of(request, 1))
    first.wait_for_commits()
    assert first.done(workers=2) == Done(own=0, committed=2, workers=2, others=2 + 8)
    first.close()
    other.close()
