"""A job without a model: a fake engine whose records depend only on the prompt's id, the sample and the seed.

``python -m tests.support.jobs OVERRIDES`` runs one, for tests that kill it or run several; ``ROLLOUT_TEST_DELAY`` is
the seconds that a record takes.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rollout.batcher.types import Observation
from rollout.config.compose import load_config
from rollout.config.schema import Config
from rollout.data.dataset_row import Prompt
from rollout.data.prompts import Prompts
from rollout.errors import PromptError
from rollout.job.job import Loaded, run_job
from rollout.job.ranks import Topology
from rollout.records import Record
from rollout.requests import Request, StepReport
from rollout.run_dir.shards import read_shard
from rollout.sampling_params import SamplingParams
from rollout.tokenization.prompt import EncodedPrompt

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


class FakeEngine:
    """Keeps `LIVE` samples live, reads requests as samples are admitted, and finishes them in mixed order."""

    def __init__(self, delay: float = 0.0, fail_after: int | None = None) -> None:
        self.delay = delay
        self.fail_after = fail_after
        self.asked: list[tuple[str, int]] = []
        """Every requested (row_id, sample), in order."""
        self.live_counts: list[int] = []
        """Live samples at each step."""

    def check_params(self, params: SamplingParams) -> None:
        pass

    def encode(self, prompt: Prompt) -> list[int]:
        if prompt == "unencodable":
            raise PromptError("bad_prompt", "this prompt cannot be encoded")
        return [len(str(prompt)), 7]

    def run(
        self, requests: Iterable[Request], *, on_step: Callable[[StepReport], None] | None = None
    ) -> Iterator[Record]:
        waiting: Iterator[tuple[Request, int]] = (
            (request, sample)
            for request in requests
            for sample in (range(request.params.n) if request.samples is None else request.samples)
        )
        live: deque[tuple[Request, int]] = deque()
        rng = random.Random(0)
        step = 0
        while True:
            while len(live) < LIVE and (row := next(waiting, None)) is not None:
                live.append(row)
                self.asked.append((row[0].row_id, row[1]))
            if not live:
                return
            self.live_counts.append(len(live))
            if self.fail_after is not None and step >= self.fail_after:
                raise RuntimeError("the engine fails here")
            if on_step is not None:
                on_step(report_of(step, live_rows=len(live), waiting_rows=int(len(live) == LIVE)))
            time.sleep(self.delay)
            live.rotate(rng.randrange(LIVE))
            yield record_of(*live.popleft())
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


def load_fake(engine: FakeEngine | None = None) -> Callable[[Config, Prompts, Topology], Loaded]:
    """Return a function that loads a fake engine, for `run_job`."""

    def load(config: Config, prompts: Prompts, topology: Topology) -> Loaded:
        used = engine or FakeEngine()
        return Loaded(engine=used, encoder=FakeEncoder(used), dtype="float32", attention="none", memory="cpu")

    return load


def refuse_to_load(config: Config, prompts: Prompts, topology: Topology) -> Loaded:
    """Fail a test in which no model may be loaded."""
    raise AssertionError("the model was loaded")


def fake_model(folder: Path, content: str = "{}") -> Path:
    """Create a folder that can be fingerprinted as a model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(content)
    return folder


def config_of(folder: Path, *overrides: str) -> Config:
    """Load the configuration of a job in a folder: its model is ``folder/model``, its output ``folder/out``."""
    fake_model(folder / "model")
    return load_config([f"model.path={folder / 'model'}", f"output.dir={folder / 'out'}", *overrides])


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
    sys.exit(run_job(load_config(sys.argv[1:]), load_fake(engine)))
