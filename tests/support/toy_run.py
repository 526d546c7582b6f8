"""A worker of a small run on any file system: the product's claims, part files and commits around a toy engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.config.schema import Config
from rollout.data.prompts import Prompts, read_prompts
from rollout.errors import PromptError
from rollout.job.ranks import Ranks, Topology
from rollout.job.rewards import Reward
from rollout.job.shard_worker import ShardWorker
from rollout.job.stop_signals import StopSignals
from rollout.job.stopping import Stopping
from rollout.job.work_loop import mend, unless_complete, work
from rollout.records import Record
from rollout.requests import Request, StepReport
from rollout.run_dir.claims import Place, ShardClaims
from rollout.run_dir.file_system import FileSystem
from rollout.run_dir.fingerprint import Fingerprint
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.record_table import shard_schema
from rollout.run_dir.run import RunDir, existing_run, open_run, prepare_folder, read_run
from rollout.run_dir.shard_checks import damaged_shards
from rollout.run_dir.workers import Heartbeat, Worker, Workers
from rollout.sampling_params import SamplingParams
from rollout.stop_conditions import StopConditions
from rollout.tokenization.prompt import EncodedPrompt, Prompt
from tests.support.jobs import config_of, one_by_one, record_of, samples_of

T = TypeVar("T")


class Stopped(Exception):
    """The engine was told to stop, and has returned what was under way."""


OUT = Path("/run")
"""The run's directory in a simulated file system."""
FINGERPRINT = Fingerprint({"seed": 0})
BATCH = 3
"""Completions of one call of the reward."""
_TOKENS_PER_STEP = 3


@dataclass(frozen=True)
class ToyJob:
    """What all workers of a run have in common; the second row of the dataset cannot be encoded."""

    config: Config
    prompts: Prompts
    schema: pa.Schema
    bad: Prompt

    @classmethod
    def of(cls, folder: Path, rows: int, rows_per_shard: int, samples: int) -> ToyJob:
        sizes = (f"data.limit={rows}", f"output.rows_per_shard={rows_per_shard}", f"sampling.n={samples}")
        config = config_of(folder, *sizes, "data.keep_columns=[answer]", "data.id_column=id", "output.check=full")
        prompts = read_prompts(config.data, with_columns=True)
        (bad,) = prompts.rows(1, 2)
        assert bad.prompt is not None
        return cls(config, prompts, shard_schema(prompts.kept.schema, "parquet"), bad.prompt)

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        if prompt == self.bad:
            raise PromptError("bad_prompt", "this prompt cannot be encoded")
        return EncodedPrompt([len(str(prompt)), 7])


@dataclass
class ToyEngine:
    """Decodes a few samples at a time, some tokens a step, and goes on with samples that were stopped.

    Args:
        step: called before each step.
        stop_at: the step before which it stops, returning the samples under way; `Stopped` is raised then.
        live: most samples at a time.
    """

    step: Callable[[], None] = lambda: None
    stop_at: int | None = None
    live: int = 3

    def check_params(self, params: SamplingParams) -> None: ...

    def run(
        self,
        requests: Iterable[Request | None],
        *,
        on_step: Callable[[StepReport], None] | None = None,
        stop: StopConditions | None = None,
        weights_fixed: bool = False,
    ) -> Iterator[Record]:
        waiting = samples_of(requests)
        live: list[_Live] = []
        steps = 0
        while True:
            while len(live) < self.live and (row := next(waiting, None)) is not None:
                live.append(_Live.of(*row))
            if not live:
                return
            if steps == self.stop_at:
                yield from (row.stopped() for row in live)
                raise Stopped
            self.step()
            steps += 1
            for row in live:
                row.decode()
            for row in [row for row in live if row.ended]:
                live.remove(row)
                yield row.record


@dataclass
class _Live:
    target: Record
    """What the sample becomes."""
    record: Record

    @classmethod
    def of(cls, request: Request, sample: int) -> _Live:
        target = record_of(request, sample)
        resumed = request.resumed.get(sample)
        start = replace(target, completion_ids=[], logprobs=[], sampler_logprobs=[], text="")
        return cls(target, start if resumed is None else resumed)

    @property
    def ended(self) -> bool:
        return len(self.record.completion_ids) >= len(self.target.completion_ids)

    def decode(self) -> None:
        start = len(self.record.completion_ids)
        tokens = slice(start, start + _TOKENS_PER_STEP)
        lists: dict[str, list[Any]] = {
            name: [*getattr(self.record, name), *getattr(self.target, name)[tokens]]
            for name in ("completion_ids", "logprobs", "sampler_logprobs")
        }
        # All else of a record that ends is the target's; what it began with shows in its lists.
        self.record = replace(self.target, **lists)

    def stopped(self) -> Record:
        versions = [0] * len(self.record.completion_ids)
        return replace(self.record, finish_reason="abort", text="", end_ids=[5], weight_versions=versions)


class AtOnce(Executor):
    """Runs what is submitted at once, in the thread that submits it."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - raised again by the future
            future.set_exception(error)
        return future


def score(rows: list[dict[str, Any]], texts: list[str]) -> list[float]:
    return [len(str(row)) + len(text) / 7 for row, text in zip(rows, texts, strict=True)]


@dataclass
class ToyWorker:
    """One process that works on the run.

    Args:
        files: as the process sees them.
        name: text that no other process has.
        clock: monotonic seconds of the process.
        sleep: lets seconds pass.
        count: workers that begin together.
    """

    job: ToyJob
    files: FileSystem
    name: str
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    engine: ToyEngine = field(default_factory=ToyEngine)
    executor: Executor = field(default_factory=AtOnce)
    lease_seconds: float = 120.0
    place: Place = Place()
    beating: Callable[[Heartbeat], None] = Heartbeat.beat
    """Begins the heartbeats."""

    def work(self) -> bool:
        """Do what a job does, and return whether the run is complete."""
        job, files = self.job, self.files
        paths = prepare_folder(str(OUT), files)
        known = existing_run(paths, FINGERPRINT, files)
        if known is not None and known.complete() and not mend(known, full=True):
            known.clear_work()
            return True
        run = open_run(
            paths,
            job.config,
            FINGERPRINT,
            job.prompts.row_ids,
            schema=job.schema,
            dtype="float32",
            attention="none",
            workers=self.place.count,
            template_dates={},
            token=self.name,
            files=files,
        )
        with unless_complete(run, full=True):
            self._generate(run)
        if run.complete():
            run.clear_work()
            return True
        return False

    def _generate(self, run: RunDir) -> None:
        job, files, paths = self.job, self.files, run.paths
        me = Worker(f"{run.attempt:05d}-{self.place.index:05d}-{self.name}", self.name, "", 0, "")
        heartbeat = Heartbeat(files, paths, me)
        self.beating(heartbeat)
        workers = Workers(files, paths, me, self.lease_seconds, self.clock)
        claims = ShardClaims(files, paths, workers, run.shards, self.place, random.Random(self.name))
        worker = ShardWorker(
            run=run,
            claims=claims,
            writer=me.writer,
            prompts=job.prompts,
            schema=job.schema,
            encode=one_by_one(job.encode),
            params=job.config.sampling.params(),
            executor=self.executor,
            seed=0,
            reward=Reward(score, BATCH),
            clock=self.clock,
            publish=heartbeat.publish,
        )
        with closing(worker):
            work(
                run,
                self.engine,
                worker,
                claims,
                Ranks(Topology()),
                _Unstopped(StopSignals({}), clock=self.clock, sleep=self.sleep),
                on_step=_ignore,
                on_record=_ignore,
                on_wait=lambda: None,
                waits=True,
                full_check=True,
            )
        heartbeat.close()


class _Unstopped(Stopping):
    """No signal arrives in a simulation, whose waits need not look for one."""

    def wait(self, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._sleep(seconds)


def _ignore(_: object) -> None: ...


def read_output(files: FileSystem) -> list[dict[str, Any]]:
    """Read all records of a run, without their attempts, which depend on what happened."""
    folder = RunPaths(OUT).shards
    names = sorted(name for name in files.names(folder) if name.endswith(".parquet"))
    tables = [pq.read_table(pa.BufferReader(files.read(folder / name)), use_threads=False) for name in names]
    return pa.concat_tables(tables).drop_columns(["attempt"]).to_pylist() if tables else []


def check_output(files: FileSystem, expected: list[dict[str, Any]]) -> None:
    """Check that a run's directory is complete and sound, and holds what an undisturbed run's holds."""
    run = read_run(RunPaths(OUT), files)
    assert run.complete()
    assert not list(damaged_shards(run, full=True))
    found = read_output(files)
    keys = [(record["row_id"], record["sample"]) for record in found]
    assert keys == [(record["row_id"], record["sample"]) for record in expected]
    assert found == expected
