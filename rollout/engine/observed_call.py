"""Run a call's requests while its progress is drawn and its metrics are logged."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Protocol

from rollout.progress.progress import Done, Progress
from rollout.records import Record
from rollout.requests import Request, StepReport
from rollout.stats import Stats
from rollout.tracking.call_tracker import LogLine
from rollout.tracking.step_metrics import StepMetrics

OnStep = Callable[[StepReport], None]
Records = Generator[Record, None, None]


class Run(Protocol):
    """Runs requests; `Engine.run`."""

    def __call__(self, requests: Iterable[Request], *, on_step: OnStep | None = None) -> Records: ...


def observed_call(
    run: Run,
    requests: Iterable[Request],
    *,
    total: int | None,
    progress: bool,
    log_line: LogLine | None,
    stats: Callable[[], Stats | None],
) -> Records:
    """Yield the records of ``run``.

    Args:
        total: samples of the call; None if unknown.
        progress: draw the progress.
        log_line: logs a line of metrics; None: none are made.
        stats: returns the totals of ``run`` once it has ended.
    """
    finished = 0
    observers: list[OnStep] = []
    with ExitStack() as stack:
        if progress:
            observers.append(stack.enter_context(Progress(total, lambda: Done(finished))).step)
        metrics = None
        if log_line is not None:
            metrics = stack.enter_context(closing(StepMetrics(log_line)))
            observers.append(metrics.step)

        def on_step(report: StepReport) -> None:
            for observe in observers:
                observe(report)

        for record in stack.enter_context(closing(run(requests, on_step=on_step))):
            # No statement stands between taking a record and yielding it: an interrupt there would lose it.
            try:
                yield record
            finally:
                finished += 1
                if metrics is not None:
                    metrics.record(record)
    totals = stats()
    if log_line is not None and totals is not None and totals.parity is not None:
        log_line({"parity": asdict(totals.parity)})
