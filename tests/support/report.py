"""Invented metrics of a run, and the page drawn from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import pytest

from rollout.report.__main__ import main
from rollout.report.charts import Series, chart
from rollout.report.history import History, read_history
from rollout.report.time_axis import TimeAxis
from rollout.run_dir.attempts import begin_attempt
from rollout.run_dir.file_system import LOCAL
from rollout.run_dir.metrics import MetricsWriter
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.sealed_json import seal, unseal
from tests.support.jobs import report_of

BEGAN = 1_700_000_000.0
VOID = {"meta"}


def write_metrics(
    paths: RunPaths,
    worker: int,
    attempt: int,
    began: float,
    steps: list[dict[str, Any]],
    step_s: float = 0.5,
    device: str = "cpu",
) -> None:
    """Write the metrics of a worker whose steps take ``step_s`` each."""
    now = began
    with MetricsWriter(paths.metrics(worker), worker, attempt, lambda: now, lambda: now, device=device) as metrics:
        for number, values in enumerate(steps):
            now += step_s
            metrics.step(report_of(number, **{"step_ms": 1e3 * step_s} | values))


def change_run(paths: RunPaths, **values: Any) -> None:
    """Set values in ``run.json``."""
    paths.run.write_bytes(seal(unseal(paths.run.read_bytes()) | values))


def write_attempts(paths: RunPaths, attempts: Sequence[Any]) -> None:
    """Replace the attempts of a run."""
    shutil.rmtree(paths.attempts, ignore_errors=True)
    for attempt in attempts:
        begin_attempt(LOCAL, paths, attempt, "test")


class Page(HTMLParser):
    """The elements and the text of a well-formed page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.data: list[dict[str, Any]] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            if data.startswith("{"):
                self.data.append(json.loads(data))
        elif self.open and self.open[-1] != "style":
            self.text += data + " "


def drawn(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> Page:
    capsys.readouterr()
    assert main([str(paths.root)]) == 0
    assert capsys.readouterr().out == f"{paths.report}\n"
    return Page(paths.report.read_text())


def hover(page: Page, figure: int, section: int = 0) -> dict[str, list[Any]]:
    """Return the values of a figure's series, by name."""
    return {name: values for name, _, values, *_ in page.data[section]["figures"][figure]}


def a_line(**values: Any) -> dict[str, Any]:
    """Return a line as `MetricsWriter` writes it."""
    line: dict[str, Any] = dict.fromkeys(("live_rows", "row_target", "kv_tokens", "kv_bytes", "prefill_tokens"), 7)
    line |= dict.fromkeys(("worker", "attempt", "preempted_rows"), 0)
    line |= {"time": BEGAN, "seconds": 1.0, "steps": 4, "new_tokens": 28, "step_ms": 250.0, "step_ms_max": 300.5}
    line |= {"headroom_bytes": -12, "reason": "hold", "reasons": {"hold": 3, "memory": 1}}
    return line | {"step_ms_counts": {"250.0": 3, "310.0": 1}} | values


def history_of(paths: RunPaths) -> History:
    write_metrics(paths, 0, 0, BEGAN, [{}] * 200)
    return read_history(paths, {})


def figure(history: History, *series: Series) -> str:
    return chart("Samples", "", TimeAxis(history.spans), (history.starts, history.ends), series)
