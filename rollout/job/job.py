"""A job: prompts of a dataset through the engine into verified files, resumable at any time."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Protocol

from rollout.config import Config, ModelConfig
from rollout.data.prompts import Prompt, Prompts, read_prompts
from rollout.errors import Exit, InputError
from rollout.job.cpu_threads import threads
from rollout.job.progress import Progress
from rollout.job.ranks import Ranks, Topology
from rollout.job.rewards import Reward, load_reward
from rollout.job.shard_worker import ShardWorker
from rollout.length_history import LengthHistory
from rollout.records import Record
from rollout.requests import Request, StepReport
from rollout.run_dir.fingerprint import fingerprint_of
from rollout.run_dir.metrics import MetricsWriter
from rollout.run_dir.previous_lengths import lengths_of_run
from rollout.run_dir.run import RunDir, earlier_run, open_run, prepare, read_run
from rollout.run_dir.shard_locks import FileLocks
from rollout.run_dir.summary import summarise

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5


class Generator(Protocol):
    """What a job needs of the engine."""

    def run(
        self, requests: Iterable[Request], *, on_step: Callable[[StepReport], None] | None = None
    ) -> Iterator[Record]: ...

    def encode(self, prompt: Prompt) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine on a model in memory."""

    engine: Generator
    dtype: str
    """What the model computes in."""
    attention: str
    """What attends, as `Engine.attention` says."""


def load_engine(config: Config, prompts: Prompts, place: Topology) -> Loaded:
    """The model of a job with the engine on it.

    Raises:
        InputError: the model cannot be loaded or served, or has no chat template that the prompts need.
    """
    # Heavy to import, and not needed to refuse bad input.
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
        if device.type == "cpu" and (count := threads(place.local_world_size, os.environ)) is not None:
            torch.set_num_threads(count)
        tokenizer = load_tokenizer(source)
        if prompts.chat_row is not None and tokenizer.chat_template is None:
            raise InputError(
                f"Row {prompts.chat_row} is chat messages, but model.path={source.path} has no chat template: take a "
                "model that has one, or a data.prompt_column of text and data.as_chat=false."
            )
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
        )
    return Loaded(engine, str(model.dtype).removeprefix("torch."), engine.attention)


Load = Callable[[Config, Prompts, Topology], Loaded]


def run_job(config: Config, load: Load | None = None) -> Exit:
    """Run a job to its end, whoever else works on the same run, and print what it made.

    Args:
        load: makes the engine, when it is known that there is work for it; `load_engine` if None.

    Raises:
        InputError: the configuration or the input is wrong; the message is one sentence.
    """
    place = Topology.of(os.environ, config.model.tensor_parallel)
    reward = load_reward(config.reward)
    prompts = read_prompts(config.data, with_columns=reward is not None)
    former = None if config.data.lengths_from is None else lengths_of_run(config.data.lengths_from)
    if former is not None:
        logger.info("Lengths of %d prompts are known from %s.", len(former), config.data.lengths_from)
    paths = prepare(config.output.dir)
    fingerprint = fingerprint_of(config, prompts.content, _model_path(config))
    run = earlier_run(paths, fingerprint)
    with closing(Ranks(place)) as ranks:
        if not ranks.of_first(run is not None and run.complete()):
            loaded = (load or load_engine)(_of_run(config, run), prompts, place)
            if place.rank == 0:
                facts = loaded.dtype, loaded.attention
                open_run(paths, config, fingerprint, prompts.row_ids, *facts, place.workers)
            ranks.wait()
            run = read_run(paths)
            if place.together and place.rank:
                _follow(loaded.engine, ranks)
            else:
                _generate(run, config, prompts, loaded.engine, reward, former, place, ranks)
        elif place.rank == 0:
            logger.info("The run in %s is complete already.", paths.root)
    run = run or read_run(paths)
    if run.complete():
        run.clear_work()
    return _report(run) if place.rank == 0 else Exit.COMPLETE


def _follow(engine: Generator, ranks: Ranks) -> None:
    """Take part in computing what the first rank is asked; what becomes of it is the first one's business."""
    for requests in ranks.followed():
        for _ in engine.run(requests):
            pass


def _generate(
    run: RunDir,
    config: Config,
    prompts: Prompts,
    engine: Generator,
    reward: Reward | None,
    former: LengthHistory | None,
    place: Topology,
    ranks: Ranks,
) -> None:
    """Work on shards until none can be claimed; rank 0 until all are committed, whoever works on them."""
    claims = FileLocks(run.paths, run.shards, place.workers)
    work = ShardWorker(run, claims, prompts, engine.encode, config.sampling.params(), config.seed, reward, former)
    with ExitStack() as stack:
        stack.enter_context(closing(work))
        metrics = stack.enter_context(MetricsWriter(run.paths.metrics(place.worker), place.worker, run.attempt))
        observers = [metrics.step]
        if place.rank == 0:
            progress = Progress(run.rows * run.samples, lambda: run.committed_samples() + work.samples_in_open_shards)
            observers.append(stack.enter_context(progress).step)

        def on_step(report: StepReport) -> None:
            for observe in observers:
                observe(report)

        waiting = False
        while not run.complete():
            if work.claim():
                for record in engine.run(ranks.shared(work.requests()), on_step=on_step):
                    work.take(record)
            elif place.rank == 0:
                # Should one of the others die, its shards can be claimed here.
                if not waiting:
                    logger.info("Waiting for shards that other workers hold.")
                waiting = True
                time.sleep(POLL_SECONDS)
            else:
                return
        ranks.done()


def _report(run: RunDir) -> Exit:
    summary = summarise(run)
    print("\n".join(summary.lines()), flush=True)
    return Exit.ERROR_ROWS if summary.totals.error_rows else Exit.COMPLETE


def _model_path(config: Config) -> Path:
    # Imports torch: other bad input is refused before that.
    from rollout.models.loading.checkpoint import resolve_path

    model = config.model
    with _naming_model_keys():
        return Path(resolve_path(model.path, model.revision, code=model.trust_remote_code))


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


def _of_run(config: Config, run: RunDir | None) -> Config:
    """The configuration with the dtype that the run began with: ``auto`` may be another one on this machine."""
    if run is None or config.model.dtype != "auto":
        return config
    return replace(config, model=replace(config.model, dtype=run.dtype))
