"""Run a job: generate completions for a dataset into a run directory, resumable at any time."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Protocol

from rollout.config.schema import Config, ModelConfig
from rollout.data.prompts import Prompts, read_prompts
from rollout.data.row_params import RowParams
from rollout.errors import Exit, InputError
from rollout.job.cpu_threads import choose_threads
from rollout.job.hints import hint_at_length, hint_at_prompts
from rollout.job.prompt_encoding import Encoder, make_encoder
from rollout.job.ranks import Ranks, Topology
from rollout.job.rewards import load_reward
from rollout.job.sampling_defaults import with_model_defaults
from rollout.job.shard_worker import ShardWorker
from rollout.progress.progress import Progress
from rollout.record_columns import ABSENT_LOGPROBS
from rollout.records import REASONING, RECORD_COLUMNS, Record
from rollout.requests import Request, StepReport
from rollout.run_dir.fingerprint import fingerprint_of
from rollout.run_dir.metrics import MetricsWriter, active_workers
from rollout.run_dir.previous_lengths import read_lengths
from rollout.run_dir.record_table import shard_schema
from rollout.run_dir.run import RunDir, existing_run, open_run, prepare_folder, read_run
from rollout.run_dir.shard_locks import FileLocks
from rollout.run_dir.summary import summarise
from rollout.sampling_params import SamplingParams
from rollout.tracking.trackers import check_tracker
from rollout.tracking.tracking import Tracking

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5


class Generator(Protocol):
    """The part of the engine that a job uses."""

    def run(
        self, requests: Iterable[Request], *, on_step: Callable[[StepReport], None] | None = None
    ) -> Iterator[Record]: ...

    def check_params(self, params: SamplingParams) -> None: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine on a loaded model."""

    engine: Generator
    encoder: Encoder
    """Encodes the prompts; known to serve the first of them."""
    dtype: str
    """The model's dtype."""
    attention: str
    """The value of `Engine.attention`."""
    memory: str
    """The value of `Engine.memory`."""


def load_engine(config: Config, prompts: Prompts, topology: Topology) -> Loaded:
    """Load the job's model and build an engine on it.

    Raises:
        InputError: the model cannot be loaded or served, or lacks the chat template that the prompts need.
    """
    start = time.monotonic()
    logger.info("Loading the model.")
    # Imported here because bad input is refused without them, and they take seconds.
    import torch
    import transformers

    from rollout.engine.engine import Engine
    from rollout.models.attention.select import check_available
    from rollout.models.errors import UnsupportedModel
    from rollout.models.loading.load import ModelSource, load_model, load_tokenizer, resolve_device

    transformers.utils.logging.disable_progress_bar()
    named = asdict(config.model)
    attention = named.pop("attention")
    source = ModelSource(**named)
    with _naming_model_keys():
        device = resolve_device(source.device)
        check_available(attention, device)
        if device.type == "cpu" and (count := choose_threads(topology.local_world_size, os.environ)) is not None:
            torch.set_num_threads(count)
        tokenizer = load_tokenizer(source)
        if topology.rank == 0:
            hint_at_prompts(tokenizer, prompts, config.data)
        encoder = make_encoder(config.data, tokenizer, prompts, source.path)
        model = load_model(source, device)
    with _naming_model_keys(UnsupportedModel):
        engine = Engine(
            model,
            tokenizer,
            policy=config.batcher.policy(),
            latency_budget_ms=config.batcher.latency_budget_ms,
            max_rows=config.batcher.max_rows,
            min_rows=config.batcher.min_rows,
            max_kv_bytes=config.memory.max_kv_bytes,
            reserve_fraction=config.memory.reserve_fraction,
            attention=attention,
            skip_special_tokens=config.output.skip_special_tokens,
            split_reasoning=config.output.split_reasoning,
        )
    try:
        engine.check_params(config.sampling.params())
    except InputError as error:
        # The message begins with the name of the parameter.
        raise InputError(f"sampling.{error}") from error
    if topology.rank == 0:
        hint_at_length(config.sampling.max_new_tokens, engine.context_limit)
    logger.info(
        "Loaded the model in %.0f s: %s on %s, attention %s.",
        time.monotonic() - start,
        str(model.dtype).removeprefix("torch."),
        device,
        engine.attention,
    )
    return Loaded(
        engine=engine,
        encoder=encoder,
        dtype=str(model.dtype).removeprefix("torch."),
        attention=engine.attention,
        memory=engine.memory,
    )


Load = Callable[[Config, Prompts, Topology], Loaded]


def run_job(config: Config, load: Load | None = None, given: Collection[str] = ()) -> Exit:
    """Run a job to its end, together with any other workers on the same run, and print its summary.

    Args:
        load: builds the engine, once it is known that there is work for it; `load_engine` if None.
        given: sampling parameters that the command line sets, whether or not to their defaults.

    Raises:
        InputError: the configuration or the input is wrong; the message is one sentence.
    """
    topology = Topology.from_environment(os.environ, config.model.tensor_parallel)
    check_tracker(config.tracker)
    reward = load_reward(config.reward)
    record_columns = (*RECORD_COLUMNS, *([REASONING] if config.output.split_reasoning else ()))
    prompts = read_prompts(config.data, with_columns=reward is not None, record_columns=record_columns)
    logger.info("Read %s prompts.", f"{len(prompts):,}")
    previous_lengths = None if config.data.lengths_from is None else read_lengths(config.data.lengths_from)
    if previous_lengths is not None:
        logger.info("Read the lengths of %d prompts from %s.", len(previous_lengths), config.data.lengths_from)
    paths = prepare_folder(config.output.dir)
    kept = prompts.kept
    logger.info("Loading PyTorch, and looking for the model %s.", config.model.path)
    model, adapter = _model_files(config)
    config = replace(config, sampling=with_model_defaults(config.sampling, model, given))
    fingerprint = fingerprint_of(
        config,
        prompts.content,
        model,
        adapter,
        kept=list(kept.names.values()),
        kept_content=kept.digest(),
    )
    schema = shard_schema(
        kept.schema, config.output.format, ABSENT_LOGPROBS[config.output.logprobs], config.output.split_reasoning
    )
    run = existing_run(paths, fingerprint)
    with closing(Ranks(topology)) as ranks:
        if not ranks.broadcast(run is not None and run.complete()):
            loaded = (load or load_engine)(_with_run_dtype(config, run), prompts, topology)
            if topology.rank == 0:
                open_run(
                    paths,
                    config,
                    fingerprint,
                    prompts.row_ids,
                    schema=schema,
                    dtype=loaded.dtype,
                    attention=loaded.attention,
                    workers=topology.workers,
                    template_dates=loaded.encoder.dates,
                )
            ranks.barrier()
            run = read_run(paths)
            if topology.tensor_parallel and topology.rank:
                _follow(loaded.engine, ranks)
            else:
                params = config.sampling.params()
                locks = FileLocks(run.paths, run.shards, topology.workers)
                worker = ShardWorker(
                    run=run,
                    locks=locks,
                    prompts=prompts,
                    schema=schema,
                    # A resumed run renders the dates with which it began.
                    encode=loaded.encoder.dated(run.fingerprint.template_dates).encode,
                    params=params,
                    row_params=RowParams(params, config.data.sampling_columns or {}, check=loaded.engine.check_params),
                    seed=config.seed,
                    reward=reward,
                    previous_lengths=previous_lengths,
                )
                _generate(config, run, loaded, worker, topology, ranks)
        elif topology.rank == 0:
            logger.info("The run in %s is complete already; nothing to generate.", paths.root)
    run = run or read_run(paths)
    if run.complete():
        run.clear_work()
    return _print_summary(run) if topology.rank == 0 else Exit.COMPLETE


def _follow(engine: Generator, ranks: Ranks) -> None:
    """Run rank 0's requests and discard the records, as the other ranks of a tensor-parallel worker do."""
    for requests in ranks.received():
        for _ in engine.run(requests):
            pass


def _generate(
    config: Config, run: RunDir, loaded: Loaded, worker: ShardWorker, topology: Topology, ranks: Ranks
) -> None:
    """Work on shards until none can be claimed; rank 0 continues until all workers have committed theirs."""
    with ExitStack() as stack:
        stack.enter_context(closing(worker))
        metrics_path = run.paths.metrics(topology.worker)
        on_line = None
        if config.tracker != "none" and topology.rank == 0:
            run_name = f"{run.paths.root.name}-{topology.worker}" if topology.workers > 1 else run.paths.root.name
            on_line = stack.enter_context(Tracking(config.tracker, run.paths.trackers, run_name, asdict(config))).log
        metrics = stack.enter_context(
            MetricsWriter(metrics_path, topology.worker, run.attempt, device=loaded.memory, on_line=on_line)
        )
        observers = [metrics.step]
        progress: Progress | None = None
        if topology.rank == 0:
            progress = stack.enter_context(
                Progress(
                    run.rows * run.samples,
                    lambda: worker.done(active_workers(run.paths)),
                )
            )
            observers.append(progress.step)

        def on_step(report: StepReport) -> None:
            for observe in observers:
                observe(report)

        if topology.rank == 0:
            done = run.committed_samples()
            logger.info(
                "Generating %s samples (%s prompts, %d each)%s.",
                f"{run.rows * run.samples:,}",
                f"{run.rows:,}",
                run.samples,
                f"; {done:,} are there already" if done else "",
            )
        waiting = False
        while not run.complete():
            if worker.claim():
                for record in loaded.engine.run(ranks.share(worker.requests()), on_step=on_step):
                    for stored in worker.accept(record):
                        metrics.record(stored)
                for stored in worker.flush():
                    metrics.record(stored)
            elif topology.rank == 0:
                # If another worker dies, its shards can be claimed here.
                if not waiting:
                    logger.info("Other workers have taken all that is left; waiting until they have finished it.")
                waiting = True
                if progress is not None:
                    progress.waiting()
                time.sleep(POLL_SECONDS)
            else:
                return
        ranks.end_sharing()


def _print_summary(run: RunDir) -> Exit:
    summary = summarise(run)
    print("\n".join(summary.lines()), flush=True)
    return Exit.ERROR_ROWS if summary.totals.error_rows else Exit.COMPLETE


def _model_files(config: Config) -> tuple[Path, Path | None]:
    """Return the local folder or file of the model, and the folder of its adapter."""
    # Imports torch, so it runs after the other input is checked.
    from rollout.models.loading.checkpoint import locate

    model = config.model
    with _naming_model_keys():
        return locate(model.path, model.revision, model.adapter, code=model.trust_remote_code)


@contextmanager
def _naming_model_keys(kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Turn errors of rollout.models into input errors that name the configuration key of the parameter at fault."""
    try:
        yield
    except InputError:
        raise
    except kind as error:
        message = str(error)
        # Messages about a parameter begin with its name: "path 'x' does not exist", "attention=triton was requested".
        parameter = message.replace("=", " ").partition(" ")[0]
        named = parameter in {field.name for field in fields(ModelConfig)}
        raise InputError(f"model.{message}" if named else message) from error


def _with_run_dtype(config: Config, run: RunDir | None) -> Config:
    """Replace ``model.dtype=auto`` by the dtype that the run began with: ``auto`` depends on the machine."""
    if run is None or config.model.dtype != "auto":
        return config
    return replace(config, model=replace(config.model, dtype=run.dtype))
