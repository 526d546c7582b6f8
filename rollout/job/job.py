"""Run a job: generate completions for a dataset into a run directory, resumable at any time."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Collection
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from rollout.closing import closed_by
from rollout.config.schema import Config
from rollout.data.prompts import Prompts, read_prompts
from rollout.data.row_params import RowParams
from rollout.errors import Exit
from rollout.job.effort import Effort
from rollout.job.heartbeat_thread import beating
from rollout.job.loading import Generator, Load, Loaded, load_engine, model_files, reference_files, with_run_dtype
from rollout.job.prompt_encoding import prompt_tokens
from rollout.job.prompt_reader import PromptReader
from rollout.job.ranks import Ranks, Topology
from rollout.job.retrying import Opened, Retry
from rollout.job.reward_source import source_of
from rollout.job.rewards import Reward, load_reward
from rollout.job.sampling_defaults import with_model_defaults
from rollout.job.shard_worker import ShardWorker
from rollout.job.stop_signals import Stopped, stop_signals
from rollout.job.stopping import Stopping
from rollout.job.time_limit import time_limit
from rollout.job.work_loop import mend, unless_complete, work
from rollout.length_history import LengthHistory
from rollout.logs import say
from rollout.progress.progress import Progress
from rollout.record_columns import ABSENT_LOGPROBS
from rollout.records import record_columns
from rollout.requests import StepReport
from rollout.run_dir.attempts import end_attempt
from rollout.run_dir.claims import Place, ShardClaims
from rollout.run_dir.costs import write_cost
from rollout.run_dir.file_system import LOCAL, see_afresh
from rollout.run_dir.fingerprint import fingerprint_of
from rollout.run_dir.metrics import MetricsWriter, active_workers
from rollout.run_dir.previous_lengths import read_lengths
from rollout.run_dir.record_table import shard_schema
from rollout.run_dir.run import RunDir, existing_run, open_run, prepare_folder, read_run, restore_row_ids
from rollout.run_dir.shard_checks import warn_of_foreign_files
from rollout.run_dir.summary import Summary, summarise
from rollout.run_dir.workers import Heartbeat, Worker, Workers
from rollout.tracking.trackers import check_tracker
from rollout.tracking.tracking import Tracking

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """What a job works on."""

    config: Config
    run: RunDir
    prompts: Prompts
    schema: pa.Schema
    """The columns of the shards."""
    reward: Reward | None
    previous_lengths: LengthHistory | None
    """Lengths of a previous run's completions."""


def run_job(config: Config, load: Load | None = None, given: Collection[str] = (), retry: Retry | None = None) -> Exit:
    """Run a job to its end, together with any other workers on the same run, and print its summary.

    Args:
        load: builds the engine, once it is known that there is work for it; `load_engine` if None.
        given: sampling parameters that the command line sets, whether or not to their defaults.
        retry: the errors of the run in the folder that are to be generated or scored again.

    Raises:
        InputError: the configuration or the input is wrong; the message is one sentence.
        Stopped: a signal or a deadline has ended the job before it was complete; the same command resumes it.
    """
    with stop_signals() as signals:
        stopping = Stopping(signals, time_limit(config.job.deadline, os.environ))
        return _run(config, load or load_engine, given, retry, stopping)


def _run(config: Config, load: Load, given: Collection[str], retry: Retry | None, stopping: Stopping) -> Exit:
    begun = time.monotonic()
    topology = Topology.from_environment(os.environ, config.model.tensor_parallel)
    check_tracker(config.tracker)
    reward = load_reward(config.reward)
    refers = config.model.reference is not None
    own = record_columns(config.output.split_reasoning, refers)
    prompts = read_prompts(config.data, with_columns=reward is not None, record_columns=own)
    logger.info("Read %s prompts.", f"{len(prompts):,}")
    previous_lengths = None if config.data.lengths_from is None else read_lengths(config.data.lengths_from)
    if previous_lengths is not None:
        logger.info("Read the lengths of %d prompts from %s.", len(previous_lengths), config.data.lengths_from)
    paths = prepare_folder(config.output.dir)
    kept = prompts.kept
    logger.info("Looking for the model %s.", config.model.path)
    model, adapter = model_files(config)
    config = replace(config, sampling=with_model_defaults(config.sampling, model, given))
    fingerprint = fingerprint_of(
        config,
        prompts.content,
        model,
        adapter,
        kept=list(kept.names.values()),
        kept_content=kept.digest(),
        reference=reference_files(config),
        reward_source=None if config.reward is None else source_of(config.reward),
    )
    schema = shard_schema(
        kept.schema,
        config.output.format,
        ABSENT_LOGPROBS[config.output.logprobs],
        config.output.split_reasoning,
        refers,
    )
    full_check = config.output.check == "full"
    run = existing_run(paths, fingerprint)
    if run is not None and retry is not None and topology.rank == 0:
        retry.prepare(Opened(run, prompts, schema, reward))
    with closing(Ranks(topology)) as ranks, ranks.stopping_together():
        sound = topology.rank == 0 and run is not None and run.complete() and not mend(run, full=full_check)
        if not ranks.broadcast(sound):
            if ranks.broadcast(stopping.now()):
                raise Stopped
            loaded = load(with_run_dtype(config, run), prompts, topology)
            stopping.join(ranks)
            attempt = 0
            if topology.rank == 0:
                opened = open_run(
                    paths,
                    config,
                    fingerprint.encoded(prompt_tokens(loaded.encoder, prompts)),
                    prompts.row_ids,
                    schema=schema,
                    dtype=loaded.dtype,
                    attention=loaded.attention,
                    workers=topology.workers,
                    template_dates=loaded.encoder.dates,
                    token=secrets.token_hex(4),
                    processes=topology.world_size,
                    loading_seconds=time.monotonic() - begun,
                )
                attempt = opened.attempt
            attempt = ranks.broadcast(attempt)
            # Rank 0 may have written the run just now, on another machine.
            see_afresh(LOCAL, paths.root)
            run = read_run(paths, attempt=attempt)
            # From here on, a signal waits until what is under way is saved.
            with stopping.signals.noted():
                if topology.tensor_parallel and topology.rank:
                    _follow(loaded.engine, ranks, stopping)
                    saved = ""
                else:
                    job = Job(config, run, prompts, schema, reward, previous_lengths)
                    saved = ""
                    with unless_complete(run, full=full_check):
                        effort = Effort()
                        saved = _generate(job, loaded, topology, ranks, stopping, effort)
                        if topology.rank == 0:
                            _end_attempt(run, effort)
                reason = ranks.broadcast(stopping.reason) if topology.tensor_parallel else stopping.reason
            if reason is not None and not run.complete():
                raise Stopped(
                    ""
                    if topology.rank
                    else f"Stopped by {reason}: {saved}; the same command resumes the run in {paths.root}."
                )
        elif topology.rank == 0:
            assert run is not None
            restore_row_ids(run, prompts.row_ids, secrets.token_hex(4))
            logger.info("The run in %s is complete already; nothing to generate.", paths.root)
    run = run or read_run(paths)
    if not run.complete():
        # The workers that have the rest finish the run.
        return Exit.COMPLETE
    summary = summarise(run) if topology.rank == 0 else None
    if summary is not None and summary.cost is not None and not sound:
        write_cost(run, summary.cost, secrets.token_hex(4))
    run.clear_work()
    if summary is None:
        return Exit.COMPLETE
    warn_of_foreign_files(run)
    return _print(summary)


def _follow(engine: Generator, ranks: Ranks, stopping: Stopping) -> None:
    """Run rank 0's requests and discard the records, as the other ranks of a tensor-parallel worker do."""
    for requests in ranks.received():
        if requests is None:
            # Rank 0 is told of a signal, and ends this.
            stopping.now()
            continue
        for _ in engine.run(requests, stop=stopping.conditions, weights_fixed=True):
            pass


def _generate(job: Job, loaded: Loaded, topology: Topology, ranks: Ranks, stopping: Stopping, effort: Effort) -> str:
    """Work on the run as one of its workers, and return how much of it is done, as the middle of a sentence."""
    config, run = job.config, job.run
    me = Worker.of_process(run.attempt, topology.rank, os.environ)
    lease_seconds = config.job.lease_seconds
    with ExitStack() as stack:
        heartbeat = Heartbeat(run.files, run.paths, me)
        stack.enter_context(beating(heartbeat, lease_seconds))
        workers = Workers(run.files, run.paths, me, lease_seconds)
        claims = ShardClaims(run.files, run.paths, workers, run.shards, Place(topology.worker, topology.workers))
        executor = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="commit"))
        worker = _shard_worker(job, loaded, claims, heartbeat, executor, effort, on_stored=stopping.stored)
        stack.enter_context(closed_by(worker.close))
        on_line = None
        if config.tracker != "none" and topology.rank == 0:
            run_name = f"{run.paths.root.name}-{topology.worker}" if topology.workers > 1 else run.paths.root.name
            on_line = stack.enter_context(Tracking(config.tracker, run.paths.trackers, run_name, asdict(config))).log
        metrics_path = run.paths.metrics(topology.worker)
        metrics = stack.enter_context(
            MetricsWriter(metrics_path, topology.worker, run.attempt, device=loaded.memory, on_line=on_line)
        )
        observers = [metrics.step, stopping.step]
        on_wait: Callable[[], None] = _nothing
        if topology.rank == 0:
            samples = run.rows * run.samples
            progress = stack.enter_context(Progress(samples, lambda: worker.done(active_workers(run.paths))))
            observers.append(progress.step)
            on_wait = progress.waiting
            done = run.samples_of(run.committed())
            logger.info(
                "Generating %s samples (%s prompts, %d each)%s.",
                f"{samples:,}",
                f"{run.rows:,}",
                run.samples,
                f"; {done:,} are there already" if done else "",
            )

        def on_step(report: StepReport) -> None:
            for observe in observers:
                observe(report)

        work(
            run,
            loaded.engine,
            worker,
            claims,
            ranks,
            stopping,
            on_step=on_step,
            on_record=metrics.record,
            on_wait=on_wait,
            waits=topology.rank == 0,
            full_check=config.output.check == "full",
            effort=effort,
        )
        known = worker.done(workers=1)
        finished = f"{known.own + known.committed:,} of {run.rows * run.samples:,} samples are done"
        return f"{finished}, and {worker.under_way:,} under way are saved"


def _nothing() -> None:
    """Do nothing, as workers without a progress line do while they wait."""


def _shard_worker(
    job: Job,
    loaded: Loaded,
    claims: ShardClaims,
    heartbeat: Heartbeat,
    executor: Executor,
    effort: Effort,
    on_stored: Callable[[int, float], None],
) -> ShardWorker:
    config, run = job.config, job.run
    params = config.sampling.params()
    return ShardWorker(
        run=run,
        claims=claims,
        writer=heartbeat.worker.writer,
        prompts=job.prompts,
        schema=job.schema,
        # A resumed run renders the dates with which it began.
        encode=PromptReader(loaded.encoder.dated(run.fingerprint.template_dates)).encoded,
        params=params,
        executor=executor,
        row_params=RowParams(params, config.data.sampling_columns or {}, check=loaded.engine.check_params),
        seed=config.seed,
        reward=job.reward,
        reference=loaded.reference,
        previous_lengths=job.previous_lengths,
        on_stored=on_stored,
        publish=heartbeat.publish,
        effort=effort,
    )


def _end_attempt(run: RunDir, effort: Effort) -> None:
    """Note in the attempt's file that it has ended, and what its first worker measured."""
    ended = {"ended": round(time.time(), 3), "cost": effort.measured()}
    end_attempt(run.files, run.paths, run.attempt, ended, secrets.token_hex(4))


def _print(summary: Summary) -> Exit:
    say("\n".join(summary.lines()))
    return Exit.ERROR_ROWS if summary.totals.error_rows else Exit.COMPLETE
