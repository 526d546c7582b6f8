"""Progress: a bar on a terminal, text in a notebook, lines elsewhere; only what is known is said."""

from __future__ import annotations

import io
import logging
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rollout.batcher.types import FinishedRow, Observation, StepSample
from rollout.logs import StderrHandler
from rollout.progress.displays import StderrConsole
from rollout.progress.progress import Done, Progress
from tests.support.jobs import NOTHING_LIVE, report_of


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def observation(age: int, finished: int = 0, ms: float = 125.0) -> Observation:
    """Seven live rows, one step of ``ms``, and rows that ended after 50 tokens."""
    return Observation(
        prompt_tokens=np.full(7, 20),
        generated_tokens=np.full(7, age),
        max_new_tokens=np.full(7, 100),
        waiting_rows=1,
        waiting_prompt_tokens=20,
        kv_tokens_held=0,
        kv_tokens_free=0,
        headroom_bytes=0,
        bytes_per_token=1,
        steps=(StepSample(rows=7, kv_tokens=140, prefill_tokens=0, ms=ms),),
        finished=(FinishedRow(20, 50),) * finished,
    )


def drawn(console: Console, seconds: float, total: int | None = 100, workers: int = 1, others: float = 0) -> str:
    """Draw a run in which a row of 50 tokens ends every fourth step, for so many seconds of eight steps."""
    clock, done = Clock(), 0
    out = console.file
    assert isinstance(out, io.StringIO)
    with Progress(total, lambda: Done(done, 0, workers, others), console, clock) as progress:
        for step in range(round(seconds * 8)):
            clock.now += 0.125
            ended = int(step % 4 == 3)
            done += ended
            seen = observation(step % 50, ended)
            progress.step(report_of(step, live_rows=7, row_target=9, reason="latency", new_tokens=3, observation=seen))
    return out.getvalue()


def test_lines_without_a_terminal_come_every_ten_seconds() -> None:
    lines = drawn(Console(file=io.StringIO(), width=200), seconds=35).splitlines()
    assert len(lines) == 4, "the last one when it ends"
    assert all("\x1b" not in line for line in lines)
    assert lines[2].startswith("60/100 samples · 0:")
    assert lines[2].endswith(" left · 24 tok/s · 7 live of 9 (latency)")
    assert lines[3] == "70/100 samples · 0:35 in all · 24 tok/s"


def test_terminal_shows_a_bar() -> None:
    text = drawn(Console(file=io.StringIO(), force_terminal=True, width=120), seconds=5)
    assert text.count("tok/s · 7 live of 9 (latency)") > 5
    assert "━" in text
    assert "\x1b[2K" in text


def test_time_left_is_a_dash_before_there_is_evidence() -> None:
    clock = Clock()
    progress = Progress(1000, lambda: Done(0), Console(file=io.StringIO()), clock)
    progress.step(report_of(0))
    clock.now += 2
    assert " · – left · " in progress.view(clock.now).line
    assert drawn(Console(file=io.StringIO()), seconds=35, total=None).splitlines()[0].startswith("20 samples · – left")


def test_rate_is_a_dash_where_the_first_step_is_the_first_thing_drawn() -> None:
    clock = Clock()
    progress = Progress(1000, lambda: Done(0), Console(file=io.StringIO()), clock)
    progress.step(report_of(0, new_tokens=64))
    assert " · – tok/s · " in progress.view(clock.now).line


def test_narrow_terminal_shows_the_time_left() -> None:
    text = drawn(Console(file=io.StringIO(), force_terminal=True, width=40), seconds=20)
    assert text.count(" left") > 5


def test_time_left_leaves_out_what_other_workers_do() -> None:
    def left(workers: int, total: int, others: float) -> int:
        console = Console(file=io.StringIO(), width=200)
        last = drawn(console, seconds=65, total=total, workers=workers, others=others).splitlines()[-2]
        hours, minutes, seconds = f"0:{last.split(' · ')[1].removesuffix(' left')}".split(":")[-3:]
        return 3600 * int(hours) + 60 * int(minutes) + int(seconds)

    assert left(2, 5000, others=2500) == pytest.approx(left(1, 2500, others=0), rel=0.1)


def test_numbers_of_one_worker_are_said_to_be_its_own() -> None:
    lines = drawn(Console(file=io.StringIO(), width=200), seconds=15, workers=2).splitlines()
    assert all(" · this worker: 24 tok/s" in line for line in lines)


def test_slow_counts_are_made_seldom_and_hold_up_no_other_number() -> None:
    clock, counts = Clock(), 0

    def count() -> Done:
        nonlocal counts
        counts += 1
        clock.now += 0.05
        return Done(counts)

    with Progress(1000, count, Console(file=io.StringIO()), clock) as progress:
        before = counts
        for step in range(100):
            clock.now += 0.25
            progress.step(report_of(step, live_rows=step, new_tokens=1))
            assert f" · {step} live" in progress.view(clock.now).line
        assert 2 <= counts - before <= 8


def test_log_lines_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler()
    log = logging.getLogger("tests.progress")
    log.addHandler(handler)
    try:
        with Progress(10, lambda: Done(1), Console(file=screen, force_terminal=True, width=90), Clock()) as progress:
            progress.step(report_of(0, observation=NOTHING_LIVE))
            log.warning("torn?")
    finally:
        log.removeHandler(handler)
    assert handler.stream is screen
    assert "torn?\n" in screen.getvalue().replace("\r", "")


@pytest.mark.parametrize("pair", [os.pipe, os.openpty])
@pytest.mark.parametrize("terminal", [False, True])
def test_job_goes_on_when_nobody_reads_any_longer(
    pair: Callable[[], tuple[int, int]], terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after ``| head``, or with a terminal that is closed."""
    reader, writer = pair()
    stdout = os.fstat(1)
    log = logging.getLogger("tests.progress")
    handler = StderrHandler()
    monkeypatch.setattr(logging, "raiseExceptions", True)
    with open(writer, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        clock = Clock()
        with Progress(10, lambda: Done(1), StderrConsole(force_terminal=terminal), clock) as progress:
            log.addHandler(handler)
            os.close(reader)
            try:
                for step in range(3):
                    clock.now += 20
                    progress.step(report_of(step, observation=NOTHING_LIVE))
                    log.warning("torn?")
            finally:
                log.removeHandler(handler)
        assert sys.stderr is stream
    assert os.fstat(1) == stdout, "what goes to stdout is not lost with stderr"


def test_notebook_shows_text_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    handle = types.SimpleNamespace(update=lambda data, raw: shown.append(data))

    def display(data: dict[str, str], **options: Any) -> object:
        assert options == {"raw": True, "display_id": True}
        return handle

    module = types.ModuleType("IPython.display")
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    assert drawn(Console(file=io.StringIO(), force_jupyter=True), seconds=5) == ""
    assert len(shown) > 5
    assert "tok/s · 7 live of 9 (latency)" in shown[-2]["text/plain"]
    assert "━" in shown[-1]["text/plain"]
