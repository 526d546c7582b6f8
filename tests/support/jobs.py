"""A job without a model: a fake engine whose records depend only on the prompt's id, the sample and the seed.

``python -m tests.support.jobs OVERRIDES`` runs one, for tests that kill it or run several; ``ROLLOUT_TEST_DELAY`` is
the seconds that a record takes, and ``ROLLOUT_TEST_LOADING`` those of loading.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from rollout.batcher.types import Observation
from rollout.config.compose import load_config
from rollout.config.schema import Config
from rollout.data.dataset_row import DatasetRow, Prompt
from rollout.data.prompts import Prompts
from rollout.errors import Exit, PromptError
from rollout.job.job import run_job
from rollout.job.loading import Loaded
from rollout.job.prompt_reader import EncodedRow, EncodeRows
from rollout.job.ranks import Topology
from rollout.job.reference import Reference
from rollout.job.shard_worker import ShardWorker
from rollout.job.stop_signals import Stopped
from rollout.record_columns import SCHEMA
from rollout.records import Record
from rollout.requests import Request, StepReport
from rollout.run_dir.claims import Place, ShardClaims
from rollout.run_dir.part_file import PartFile, ShardKey, finished_records
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import RunDir, read_run
from rollout.run_dir.shards import read_shard
from rollout.run_dir.workers import Worker, Workers
from rollout.sampling_params import SamplingParams
from rollout.stop_conditions import CallProgress, StopConditions
from rollout.tokenization.prompt import EncodedPrompt

T = TypeVar("T")

LIVE = 5

_NONE = np.zeros(0, np.int64)
NOTHING_LIVE = Observation(
    prompt_tokens=_NONE,
    generated_tokens=_NONE,
    max_new_tokens=_NONE,
    waiting_rows=0,
    waiting_prompt_tokens=0,
    kv_tokens_held=0,
    kv_tokens_free=0,
    headroom_bytes=0,
    bytes_per_token=1,
)


def record_of(request: Request, sample: int) -> Record:
    """Return the record of a request's sample."""
    rng = random.Random(f"{request.seed}/{request.row_id}/{sample}")
    count = rng.randint(1, 12)
    logprobs = np.array([-rng.expovariate(1) for _ in range(count)], np.float32)
    return Record(
        row_id=request.row_id,
        sample=sample,
        prompt_ids=list(request.prompt_ids),
        completion_ids=[rng.randrange(2**31) for _ in range(count)],
        text=f"é {rng.randint(0, 9)}",
        logprobs=logprobs.tolist(),
        sampler_logprobs=(logprobs / 3).tolist(),
        finish_reason=rng.choice(["stop", "length"]),
        seed=request.seed,
    )


def begun_record_of(request: Request, sample: int) -> Record:
    """Return the record of a sample that has half of its tokens, perhaps none."""
    record = record_of(request, sample)
    half = len(record.completion_ids) // 2
    return replace(
        record,
        completion_ids=record.completion_ids[:half],
        text="",
        logprobs=record.logprobs[:half],
        sampler_logprobs=record.sampler_logprobs[:half],
        weight_versions=[0] * half,
        finish_reason="abort",
    )


def samples_of(requests: Iterable[Request | None]) -> Iterator[tuple[Request, int] | None]:
    """The samples of a stream, one by one; None where it has no request for a time."""
    for request in requests:
        if request is None:
            yield None
        else:
            yield from ((request, sample) for sample in request.wanted_samples)


class FakeEngine:
    """Keeps `LIVE` samples live, reads requests as samples are admitted, and finishes them in mixed order."""

    def __init__(self, delay: float = 0.0, fail_after: int | None = None, signal_after: int | None = None) -> None:
        self.delay = delay
        self.signal_after = signal_after
        self.fail_after = fail_after
        self.asked: list[tuple[str, int]] = []
        """Every requested (row_id, sample), in order."""
        self.resumed: list[tuple[str, int]] = []
        """Those that an earlier attempt had begun."""
        self.live_counts: list[int] = []
        """Live samples at each step."""

    def check_params(self, params: SamplingParams) -> None:
        pass

    def encode(self, prompt: Prompt) -> list[int]:
        if prompt == "unencodable":
            raise PromptError("bad_prompt", "this prompt cannot be encoded")
        return [len(str(prompt)), 7]

    def run(
        self,
        requests: Iterable[Request | None],
        *,
        on_step: Callable[[StepReport], None] | None = None,
        stop: StopConditions | None = None,
        weights_fixed: bool = False,
    ) -> Iterator[Record]:
        waiting = samples_of(requests)
        live: deque[tuple[Request, int]] = deque()
        rng = random.Random(0)
        step = 0
        while True:
            while len(live) < LIVE and (row := next(waiting, None)) is not None:
                live.append(row)
                self.asked.append((row[0].row_id, row[1]))
            if not live:
                return
            if stop is not None and any(
                ends(CallProgress(0.0, step, step, step, 0, len(live), 0)) for ends in stop.of_call
            ):
                yield from (begun_record_of(*row) for row in live)
                return
            self.live_counts.append(len(live))
            if step + 1 == self.signal_after:
                signal.raise_signal(signal.SIGTERM)
            if self.fail_after is not None and step >= self.fail_after:
                raise RuntimeError("the engine fails here")
            if on_step is not None:
                on_step(report_of(step, live_rows=len(live), waiting_rows=int(len(live) == LIVE)))
            time.sleep(self.delay)
            live.rotate(rng.randrange(LIVE))
            request, sample = live.popleft()
            record = record_of(request, sample)
            if (before := request.resumed.get(sample)) is not None:
                assert record.completion_ids[: len(before.completion_ids)] == before.completion_ids
                self.resumed.append((request.row_id, sample))
            yield record
            step += 1


@dataclass(frozen=True)
class FakeEncoder:
    """Encodes as its engine does."""

    engine: FakeEngine
    dates: Mapping[str, str] = field(default_factory=dict)

    def dated(self, dates: Mapping[str, str]) -> FakeEncoder:
        return replace(self, dates=dates)

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        return EncodedPrompt(self.engine.encode(prompt))

    def encode_batch(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt | PromptError]:
        return [self._encode_or_refuse(prompt) for prompt in prompts]

    def _encode_or_refuse(self, prompt: Prompt) -> EncodedPrompt | PromptError:
        try:
            return self.encode(prompt)
        except PromptError as error:
            return error


def report_of(step: int, **values: Any) -> StepReport:
    """Return a step report with a value in every field."""
    report = StepReport(
        step=step,
        live_rows=5,
        paused_rows=0,
        waiting_rows=3,
        row_target=6,
        reason="memory",
        kv_tokens=100,
        kv_bytes=4096,
        headroom_bytes=1 << 20,
        prefill_tokens=0,
        new_tokens=5,
        preempted_rows=0,
        out_of_memory_events=0,
        step_ms=2.0,
        observation=NOTHING_LIVE,
    )
    return replace(report, **values)


def load_fake(
    engine: FakeEngine | None = None, reference: Reference | None = None
) -> Callable[[Config, Prompts, Topology], Loaded]:
    """Return a function that loads a fake engine, for `run_job`."""

    def load(config: Config, prompts: Prompts, topology: Topology) -> Loaded:
        used = engine or FakeEngine()
        if loading := float(os.environ.get("ROLLOUT_TEST_LOADING", "0")):
            print("loading", flush=True)
            time.sleep(loading)
        return Loaded(
            engine=used,
            encoder=FakeEncoder(used),
            dtype="float32",
            attention="none",
            memory="cpu",
            reference=reference,
        )

    return load


def refuse_to_load(config: Config, prompts: Prompts, topology: Topology) -> Loaded:
    """Fail a test in which no model may be loaded."""
    raise AssertionError("the model was loaded")


def write_part(run: RunDir, shard: int, records: Iterable[Record], writer: str = "00000-00000-other") -> Path:
    """Write a part file as a worker does that is killed afterwards."""
    part = PartFile(run.files, run.paths, ShardKey(run.fingerprint.digest, shard), writer)
    for record in records:
        part.append(record)
    part.close()
    return part.path


def read_part_records(out: Path) -> list[Record]:
    """Return the finished records of all part files of a run."""
    run = read_run(RunPaths(out))
    keys = [ShardKey(run.fingerprint.digest, shard) for shard in range(run.shards)]
    return [record for key in keys for record in finished_records(run.files, run.paths, key)]


def one_by_one(encode: Callable[[Prompt], EncodedPrompt]) -> EncodeRows:
    """Return what encodes rows in this thread, each when it is asked for."""

    def encoded(rows: Iterable[DatasetRow]) -> Iterator[EncodedRow]:
        for row in rows:
            if row.prompt is None:
                yield EncodedRow(row, PromptError(row.error_class, row.error))
                continue
            try:
                yield EncodedRow(row, encode(row.prompt))
            except PromptError as error:
                yield EncodedRow(row, error)

    return encoded


class InlineExecutor(Executor):
    """Runs what is submitted at once, so that commits happen in order."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the future's
            future.set_exception(error)
        return future


def shard_worker(
    run: RunDir, prompts: Prompts, config: Config, *, rank: int = 0, workers: int = 1, **others: Any
) -> ShardWorker:
    """Return a worker of a run as a job makes one, which commits at once."""
    me = Worker.of_process(run.attempt, rank, {})
    seen = Workers(run.files, run.paths, me, lease_seconds=120)
    given: dict[str, Any] = {
        "run": run,
        "claims": ShardClaims(run.files, run.paths, seen, run.shards, Place(rank, workers)),
        "writer": me.writer,
        "prompts": prompts,
        "schema": SCHEMA,
        "encode": one_by_one(lambda _: EncodedPrompt([1])),
        "params": config.sampling.params(),
        "executor": InlineExecutor(),
        "seed": config.seed,
    }
    return ShardWorker(**{**given, **others})


def fake_model(folder: Path, content: str = "{}") -> Path:
    """Create a folder that can be fingerprinted as a model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(content)
    return folder


def config_of(folder: Path, *overrides: str) -> Config:
    """Load the configuration of a job in a folder: its model is ``folder/model``, its output ``folder/out``."""
    fake_model(folder / "model")
    given = (f"model.path={folder / 'model'}", f"output.dir={folder / 'out'}", *overrides)
    config = _composed(*(override.replace(str(folder), _ANY_FOLDER) for override in given))
    moved: Config = _moved(config, str(folder))
    return moved


_ANY_FOLDER = "/folder-of-a-job"
"""Stands for a job's folder: the same keys are composed once for all folders, which takes Hydra a tenth of a second."""


@cache
def _composed(*overrides: str) -> Config:
    return load_config(overrides)


def _moved(value: Any, folder: str) -> Any:
    """Return a copy in which the folder stands."""
    if isinstance(value, str):
        return value.replace(_ANY_FOLDER, folder)
    if isinstance(value, list):
        return [_moved(each, folder) for each in value]
    if isinstance(value, dict):
        return {name: _moved(each, folder) for name, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _moved(getattr(value, each.name), folder) for each in fields(value)})
    return value


def read_records(out: Path) -> list[dict[str, Any]]:
    """Read all committed records of a run, in the order of its shards."""
    files = sorted(path for path in (out / "shards").iterdir() if path.suffix != ".json")
    return pa.concat_tables([read_shard(path) for path in files]).to_pylist() if files else []


def without_attempt(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return records without the attempt, which differs between interrupted and uninterrupted runs."""
    return [{key: value for key, value in record.items() if key != "attempt"} for record in records]


JOB = ("data.limit=20", "sampling.n=3", "output.rows_per_shard=4", "data.id_column=id")


def keys(records: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(record["row_id"], record["sample"]) for record in records]


EXPECTED = [(f"arithmetic-{row:05d}", sample) for row in range(20) for sample in range(3)]


if __name__ == "__main__":
    engine = FakeEngine(delay=float(os.environ.get("ROLLOUT_TEST_DELAY", "0")))
    try:
        sys.exit(run_job(load_config(sys.argv[1:]), load_fake(engine)))
    except Stopped as stopped:
        print(stopped.sentence, flush=True)
        os._exit(Exit.RESUMABLE)
