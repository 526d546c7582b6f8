"""The loop of a worker: generate what it can claim, then wait, leave, or see the run complete."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rollout.job.effort import Effort
from rollout.job.loading import Generator
from rollout.job.ranks import Ranks
from rollout.job.shard_worker import ShardWorker
from rollout.job.stopping import Stopping
from rollout.records import Record
from rollout.requests import StepReport
from rollout.run_dir.claims import ShardClaims
from rollout.run_dir.run import RunDir
from rollout.run_dir.shard_checks import damaged_shards, set_aside

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""Pause before an idle worker first looks again for work; each further one is twice as long."""
LONGEST_POLL_SECONDS = 15.0
PATIENCE_SECONDS = 30.0
"""How long a worker that nobody needs asks others for samples before it leaves."""


def mend(run: RunDir, *, full: bool) -> bool:
    """Set damaged shards aside, so that they are generated again, and return whether there were any."""
    damaged = list(damaged_shards(run, full=full))
    for shard in damaged:
        set_aside(run, shard)
    return bool(damaged)


@contextmanager
def unless_complete(run: RunDir, *, full: bool) -> Iterator[None]:
    """Let a worker end in peace whose files are gone because others have completed the run meanwhile.

    Args:
        full: read all shards to see whether the run is sound.
    """
    try:
        yield
    except FileNotFoundError:
        if not run.complete() or mend(run, full=full):
            raise
        logger.info("Other workers have completed the run meanwhile.")


def work(
    run: RunDir,
    engine: Generator,
    worker: ShardWorker,
    claims: ShardClaims,
    ranks: Ranks,
    stopping: Stopping,
    *,
    on_step: Callable[[StepReport], None],
    on_record: Callable[[Record], None],
    on_wait: Callable[[], None],
    waits: bool,
    full_check: bool,
    effort: Effort | None = None,
) -> None:
    """Work until the run is complete and sound, all that is left is in other workers' hands, or the job stops.

    When it stops, samples under way are stored with the tokens that they have.

    A worker that finds no shard takes samples of others, and leaves when for a time it is given none.

    Args:
        on_step, on_record: called with each step and each stored record.
        on_wait: called when the worker begins to wait for others.
        waits: whether to wait for the other workers of this launch.
        full_check: read all shards at the end.
        effort: counts the time that passes in waiting.
    """
    effort = effort or Effort()
    pause, idle = POLL_SECONDS, 0.0
    conditions = replace(stopping.conditions, withdrawn=worker.withdrawn)

    def step(report: StepReport) -> None:
        worker.step(report)
        on_step(report)

    while True:
        if stopping.admits() and (worker.claim() or worker.take()):
            pause, idle = POLL_SECONDS, 0.0
            requests = ranks.share(stopping.admitted(worker.requests()))
            for record in engine.run(requests, on_step=step, stop=conditions, weights_fixed=True):
                stopping.finished(record)
                for stored in worker.accept(record):
                    on_record(stored)
            for stored in worker.flush():
                on_record(stored)
            continue
        worker.wait_for_commits()
        if run.complete():
            if mend(run, full=full_check):
                continue
            break
        needed = worker.waits_for_others or idle < PATIENCE_SECONDS
        if stopping.reason is not None or not (waits or needed):
            break
        if claims.left_to_others() and not needed:
            logger.info("Other workers have taken all that is left, and are alive: this one is no longer needed.")
            break
        if pause == POLL_SECONDS:
            logger.info("Other workers have taken all that is left; waiting until they have finished it.")
            on_wait()
        with effort.waiting():
            stopping.wait(pause, ranks.idle)
        idle += pause
        pause = min(2 * pause, LONGEST_POLL_SECONDS)
    ranks.end_sharing()
