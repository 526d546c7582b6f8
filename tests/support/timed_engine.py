"""An engine without a model whose steps take time, and whose completions have long-tailed lengths."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from rollout.batcher.types import FinishedRow, StepSample
from rollout.records import Record
from rollout.requests import Request, StepReport
from rollout.sampling_params import SamplingParams
from rollout.stop_conditions import StopConditions, UnfinishedSample
from tests.support.jobs import NOTHING_LIVE, record_of, report_of, samples_of

_TOKENS_PER_STEP = 4


@dataclass(frozen=True)
class Lengths:
    """Lognormal lengths, a function of the row's id and the sample."""

    median: float = 200.0
    sigma: float = 1.0
    most: int = 4096

    def of(self, row_id: str, sample: int) -> int:
        """Return a sample's tokens."""
        drawn = random.Random(f"{row_id}/{sample}").lognormvariate(math.log(self.median), self.sigma)
        return min(max(1, round(drawn)), self.most)


@dataclass(frozen=True)
class Costs:
    """Milliseconds that a step takes, by what it computes."""

    step: float = 20.0
    row: float = 0.3
    prefill_token: float = 0.05


@dataclass
class _Live:
    request: Request
    sample: int
    length: int
    done: int

    @property
    def key(self) -> tuple[str, int]:
        return self.request.row_id, self.sample

    @property
    def context(self) -> int:
        return len(self.request.prompt_ids) + self.done

    def record(self, finish_reason: str) -> Record:
        """All tokens follow from the key, so whoever generates them generates the same."""
        base = record_of(self.request, self.sample)
        rng = random.Random(f"{self.request.seed}/{self.request.row_id}/{self.sample}/tokens")
        tokens = [rng.randrange(1 << 16) for _ in range(self.done)]
        numbers = [float(token % 8) for token in tokens]
        stopped = finish_reason == "abort"
        return replace(
            base,
            completion_ids=tokens,
            logprobs=numbers,
            sampler_logprobs=numbers,
            text="" if stopped else base.text,
            finish_reason=finish_reason,  # type: ignore[arg-type]
            weight_versions=[0] * len(tokens) if stopped else [],
        )


@dataclass
class TimedEngine:
    """Decodes up to ``rows`` samples at a time.

    Args:
        sleep: lets seconds pass.
        slowness: how many times as long as ``costs`` say everything takes.
        shares: whether it lets samples be withdrawn.
    """

    sleep: Callable[[float], None]
    lengths: Lengths = Lengths()
    costs: Costs = Costs()
    slowness: float = 1.0
    rows: int = 16
    shares: bool = True
    withdrawn: int = 0
    """Samples that were withdrawn."""

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
        finished: list[FinishedRow] = []
        steps = 0
        while True:
            prefill = 0
            while len(live) < self.rows and (row := next(waiting, None)) is not None:
                live.append(self._begin(*row))
                prefill += live[-1].context
            if not live:
                return
            for row in self._named(live, stop):
                live.remove(row)
                self.withdrawn += 1
                yield row.record("abort")
            if not live:
                continue
            ms = self.slowness * (self.costs.step + self.costs.row * len(live))
            prefill_ms = self.slowness * self.costs.prefill_token * prefill
            self.sleep((_TOKENS_PER_STEP * ms + prefill_ms) / 1e3)
            steps += 1
            if on_step is not None:
                kv_tokens = sum(row.context for row in live)
                took = [
                    StepSample(len(live), kv_tokens, prefill, ms + prefill_ms),
                    StepSample(len(live), kv_tokens, 0, ms),
                ]
                seen = replace(NOTHING_LIVE, steps=tuple(took), finished=tuple(finished))
                on_step(report_of(steps, live_rows=len(live), observation=seen))
                finished = []
            for row in live:
                row.done = min(row.length, row.done + _TOKENS_PER_STEP)
            for row in [row for row in live if row.done == row.length]:
                live.remove(row)
                cut = row.length == self.lengths.most
                finished.append(FinishedRow(len(row.request.prompt_ids), row.length, cut))
                yield row.record("length" if cut else "stop")

    def _begin(self, request: Request, sample: int) -> _Live:
        resumed = request.resumed.get(sample)
        done = 0 if resumed is None else len(resumed.completion_ids)
        return _Live(request, sample, self.lengths.of(request.row_id, sample), done)

    def _named(self, live: list[_Live], stop: StopConditions | None) -> list[_Live]:
        if not self.shares or stop is None or stop.withdrawn is None:
            return []
        named = set(stop.withdrawn(lambda: [self._unfinished(row) for row in live]))
        return [row for row in live if row.key in named]

    def _unfinished(self, row: _Live) -> UnfinishedSample:
        return UnfinishedSample(
            row_id=row.request.row_id,
            sample=row.sample,
            prompt_tokens=len(row.request.prompt_ids),
            generated_tokens=row.done,
            max_new_tokens=self.lengths.most,
            computed=True,
        )
