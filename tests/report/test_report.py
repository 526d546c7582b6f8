"""The picture of a run: what it adds up, what it says, and that it is one safe file."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout.errors import Exit
from rollout.job.job import run_job
from rollout.records import Record
from rollout.report.__main__ import main
from rollout.report.charts import Series, chart
from rollout.report.history import MOST_BINS, History, read_history
from rollout.report.metric_lines import Line, Span
from rollout.report.series import Limits, quantile, share_above, together
from rollout.report.time_axis import LEFT, RIGHT, TimeAxis, clock
from rollout.run_dir.metrics import MetricsWriter, read_metrics
from rollout.run_dir.part_file import encode_record
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.shards import read_shard
from rollout.verify import verify
from tests.support.jobs import config_of, load_fake, report_of

BEGAN = 1_700_000_000.0
VOID = {"meta"}


def write_metrics(
    paths: RunPaths, worker: int, attempt: int, began: float, steps: list[dict[str, Any]], step_s: float = 0.5
) -> None:
    """Metrics of a worker whose steps take ``step_s`` each."""
    now = began
    with MetricsWriter(paths.metrics(worker), worker, attempt, lambda: now, lambda: now) as metrics:
        for number, values in enumerate(steps):
            now += step_s
            metrics.step(report_of(number, **{"step_ms": 1e3 * step_s} | values))


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A complete run of 20 samples in four shards, whose metrics are to be written."""
    config = config_of(tmp_path, "data.limit=10", "sampling.n=2", "output.rows_per_shard=3")
    assert run_job(config, load_fake()) == Exit.COMPLETE
    paths = RunPaths(tmp_path / "out")
    paths.metrics(0).unlink()
    return paths


def change_run(paths: RunPaths, **values: Any) -> None:
    """Set values in ``run.json``."""
    paths.run.write_text(json.dumps(json.loads(paths.run.read_text()) | values))


class Page(HTMLParser):
    """Elements and text of a page that is well-formed."""

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
    """The values of a figure's series."""
    return {name: values for name, _, values, *_ in page.data[section]["figures"][figure]}


# -- the command -----------------------------------------------------------------------------------------


def test_a_run_as_a_job_leaves_it(tmp_path: Path) -> None:
    config = config_of(tmp_path, "data.limit=30", "sampling.max_new_tokens=77", "batcher.latency_budget_ms=50")
    assert run_job(config, load_fake()) == Exit.COMPLETE
    command = [sys.executable, "-m", "rollout.report", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'out' / 'report.html'}\n"
    text = Page((tmp_path / "out" / "report.html").read_text()).text
    for said in (
        "30 of 30; 1 of 1 shards",
        "max_new_tokens 77",
        "latency_budget_ms 50.0",
        "name predictive",
        "complete ·",
    ):
        assert said in text
    assert verify(tmp_path / "out").complete


@pytest.mark.parametrize("lacking", ["folder", "run", "metrics", "whole lines"])
def test_nothing_to_draw_is_said_in_one_sentence(
    paths: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str], lacking: str
) -> None:
    folder = paths.root
    if lacking == "folder":
        folder = tmp_path / "elsewhere"
    elif lacking == "run":
        folder = tmp_path / "empty"
        folder.mkdir()
    elif lacking == "whole lines":
        paths.metrics(0).write_text('{"time": 1, "wor\n[1]\n')
    capsys.readouterr()
    assert main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert str(folder) in captured.err
    assert not (folder / "report.html").exists()


def test_another_file(paths: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(paths, 0, 0, BEGAN, [{}])
    capsys.readouterr()
    assert main([str(paths.root), "--output", str(tmp_path / "picture.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'picture.html'}\n"
    assert not paths.report.exists()
    assert main([str(paths.root), "--output", str(tmp_path / "no" / "picture.html")]) == 2
    assert "name another file with --output" in capsys.readouterr().err


# -- one safe file ---------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    for worker in range(2):
        write_metrics(paths, worker, 0, BEGAN, [{"reason": "oom", "preempted_rows": 1}] * 30)
    page, text = drawn(paths, capsys), paths.report.read_text()
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "data", "action", "style"}
    assert not {name for name in names if name.startswith("on")}
    assert not set(page.tags) & {"link", "img", "iframe", "object", "embed", "base", "image", "use"}
    assert not re.search(r"https?:|url\(|@import|\bimport\b|fetch|XMLHttp", text)
    policy = next(value for _, value in page.attributes if value and value.startswith("default-src"))
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_all_that_is_read_is_escaped(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "</script></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\ud800"
    stored = json.loads(paths.run.read_text())
    config = {group: {evil: evil, "path": evil} for group in ("model", "data", "sampling", "output", "reward")}
    attempt = dict.fromkeys(("started", "host", "device"), evil) | {"batcher": {"name": evil, evil: [evil]}}
    change_run(paths, config=config, attempts=[attempt], packages={evil: evil}, fingerprint=stored["fingerprint"])
    manifest = json.loads(paths.manifest(0).read_text()) | {"errors": {evil: 1}, "finish_reasons": {evil: 3}}
    paths.manifest(0).write_text(json.dumps(manifest))
    for worker in range(2):
        write_metrics(paths, worker, 0, BEGAN, [{"reason": evil}] * 8)
    page = drawn(paths, capsys)
    for worker in range(2):
        paths.metrics(worker).unlink()
        write_metrics(paths, worker, 0, BEGAN, [{}] * 8)
    assert set(page.tags) == set(drawn(paths, capsys).tags)
    assert page.tags.count("script") == 4  # the values of all workers and of each, and the one that shows them
    assert page.text.count("onerror") >= 20
    assert page.data[0]["figures"][1][0][3] == [evil]


# -- what lines say --------------------------------------------------------------------------------------


def a_line(**values: Any) -> dict[str, Any]:
    """A line as `MetricsWriter` writes it."""
    line: dict[str, Any] = dict.fromkeys(("live_rows", "row_target", "kv_tokens", "kv_bytes", "prefill_tokens"), 7)
    line |= dict.fromkeys(("worker", "attempt", "preempted_rows"), 0)
    line |= {"time": BEGAN, "seconds": 1.0, "steps": 4, "new_tokens": 28, "step_ms": 250.0, "step_ms_max": 300.5}
    line |= {"headroom_bytes": -12, "reason": "hold", "reasons": {"hold": 3, "memory": 1}}
    return line | {"step_ms_counts": {"250.0": 3, "310.0": 1}} | values


def test_a_line_is_read_back() -> None:
    line = Line.of(a_line(worker=3, attempt=2))
    assert line is not None
    assert (line.worker, line.attempt, line.span, line.headroom_bytes) == (3, 2, Span(BEGAN - 1, BEGAN), -12)
    assert line.reasons == {"hold": 3, "memory": 1}
    assert line.step_ms_counts == {250.0: 3, 310.0: 1}


def test_a_line_without_counts_is_read_too() -> None:
    values = a_line()
    del values["reasons"], values["step_ms_counts"]
    line = Line.of(values)
    assert line is not None
    assert (line.reasons, line.step_ms_counts) == ({"hold": 4}, {})


@pytest.mark.parametrize(
    "values",
    [
        {"time": "now"},
        {"time": 1e300},
        {"time": 0.5},
        {"time": True},
        {"seconds": -1.0},
        {"steps": None},
        {"live_rows": math.nan},
        {"kv_bytes": math.inf},
        {"kv_tokens": 10**400},
        {"new_tokens": -1},
        {"headroom_bytes": "much"},
        {"headroom_bytes": -math.inf},
        {"worker": [0]},
        {"reasons": []},
        {"reasons": {}},
        {"reasons": {"hold": "often"}},
        {"step_ms_counts": {"long": 1}},
        {"step_ms_counts": {"nan": 1}},
        {"step_ms_counts": [250.0]},
    ],
)
def test_a_line_that_is_none(values: dict[str, Any]) -> None:
    assert Line.of(a_line()) is not None
    assert Line.of(a_line(**values)) is None


def test_a_line_that_lacks_a_number_is_none() -> None:
    for name in ("time", "seconds", "steps", "headroom_bytes", "new_tokens", "step_ms"):
        values = a_line()
        del values[name]
        assert Line.of(values) is None


def test_torn_lines_are_left_out_and_counted(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(paths, 0, 0, BEGAN, [{"new_tokens": 5}] * 6)
    with open(paths.metrics(0), "ab") as file:
        file.write(b'{"time":170000\n\xff\xfe\n' + b"[" * 100_000 + b"\nnull\n" + b'{"time": "late"}\n')
    assert "5 lines of metrics that cannot be read" in drawn(paths, capsys).text
    history = read_history(paths, {})
    assert history.unreadable == 5
    assert history.attempts[0].new_tokens == 30
    paths.metrics(0).unlink()
    write_metrics(paths, 0, 0, BEGAN, [{}])
    assert "cannot be read" not in drawn(paths, capsys).text


# -- adding up -------------------------------------------------------------------------------------------


def test_workers_attempts_and_pauses(paths: RunPaths) -> None:
    for worker, rows in ((0, 4), (1, 6)):
        steps = [{"live_rows": rows, "row_target": rows + 1, "new_tokens": rows, "kv_bytes": 100 * rows}] * 20
        write_metrics(paths, worker, 0, BEGAN, steps)
    write_metrics(paths, 0, 1, BEGAN + 3610, [{"live_rows": 2, "preempted_rows": 1, "kv_bytes": 200}] * 10)
    history = read_history(paths, {0: Limits(max_kv_bytes=450)})
    assert history.spans == [Span(BEGAN, BEGAN + 10), Span(BEGAN + 3610, BEGAN + 3615)]
    assert len(history.starts) == 15
    both = together(history.tracks.values())
    np.testing.assert_allclose(both.level("live_rows"), [10] * 10 + [2] * 5)
    np.testing.assert_allclose(both.level("row_target"), [12] * 10 + [6] * 5)
    np.testing.assert_allclose(both.rate("new_tokens"), [20] * 10 + [10] * 5)
    np.testing.assert_allclose(both.level("room_bytes")[:10], 900)  # each worker's up to its limit
    np.testing.assert_allclose(both.level("room_bytes")[10:], 200 + (1 << 20))
    np.testing.assert_allclose(both.level("max_kv_bytes"), [900] * 10 + [math.nan] * 5)
    assert both.preempted_rows.tolist() == [0] * 10 + [2] * 5
    assert np.isnan(history.tracks[1].level("live_rows")[10:]).all()
    first, second = history.attempts.values()
    assert (first.seconds, first.workers, first.new_tokens) == (10, {0, 1}, 200)
    assert (second.seconds, second.workers, second.preempted_rows) == (5, {0}, 10)


def test_headroom_that_is_taken_away_leaves_less_room_than_is_held(paths: RunPaths) -> None:
    steps = [{"kv_bytes": 1000, "headroom_bytes": headroom} for headroom in (500, 500, -300, -300, -2000, -2000)]
    write_metrics(paths, 0, 0, BEGAN, steps)
    (track,) = read_history(paths, {}).tracks.values()
    np.testing.assert_allclose(track.level("room_bytes"), [1500, 700, 0])


def test_nothing_is_lost_in_bins(paths: RunPaths) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    began = BEGAN
    for attempt in range(3):
        for worker in range(3):
            steps = [
                {"new_tokens": rng.randrange(50), "preempted_rows": rng.randrange(3), "step_ms": rng.uniform(1, 900)}
                | {"reason": rng.choice("abc"), "live_rows": rng.randrange(9)}
                for _ in range(rng.randrange(1, 1500))
            ]
            write_metrics(paths, worker, attempt, began + rng.random(), steps, rng.uniform(0.1, 2))
        began += rng.choice([1000, 5000])
    lines = list(read_metrics(paths))
    history = read_history(paths, {})
    both = together(history.tracks.values())
    # Spans of many attempts end in bins of their own.
    assert len(history.starts) <= MOST_BINS + len(history.spans)
    seconds = history.ends - history.starts
    assert seconds.sum() == pytest.approx(sum(span.seconds for span in history.spans))
    new_tokens = sum(float(np.nansum(track.rate("new_tokens") * track.covered)) for track in history.tracks.values())
    assert new_tokens == pytest.approx(sum(line["new_tokens"] for line in lines))
    assert both.preempted_rows.sum() == sum(line["preempted_rows"] for line in lines)
    steps_taken = sum(line["steps"] for line in lines)
    assert sum(values.sum() for values in both.reasons.values()) == pytest.approx(steps_taken)
    assert sum(sum(counts.values()) for counts in both.step_ms_counts) == pytest.approx(steps_taken)
    assert np.nanmax(both.peak("step_ms_max")) == max(line["step_ms_max"] for line in lines)
    assert both.level_seconds("live_rows") == pytest.approx(
        sum(line["live_rows"] * line["seconds"] for line in lines), rel=1e-3
    )


def test_a_line_of_no_time_counts(paths: RunPaths) -> None:
    write_metrics(paths, 0, 0, BEGAN, [{"new_tokens": 3}], step_s=0.0)
    history = read_history(paths, {})
    assert history.attempts[0].new_tokens == 3
    assert len(history.starts) == 1


def test_quantiles() -> None:
    counts = {10.0: 50.0, 20.0: 45.0, 30.0: 4.0, 1000.0: 1.0}
    assert [quantile(counts, q) for q in (0.0, 0.5, 0.51, 0.95, 0.99, 1.0)] == [10, 10, 20, 20, 30, 1000]
    assert quantile({2.0: 0.1, 1.0: 0.7, 3.0: 0.2}, 1.0) == 3  # as shares of steps add up
    assert math.isnan(quantile({}, 0.5))
    assert share_above(counts, 20) == 0.05
    assert math.isnan(share_above({}, 20))


# -- what is drawn ---------------------------------------------------------------------------------------


def test_the_pointer_finds_all_values(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    change_run(paths, attempts=[{"batcher": {"latency_budget_ms": 400}, "memory": {"max_kv_bytes": None}}])
    steps = [{"live_rows": 5 + i // 2, "reason": "cap" if i % 2 else "memory", "kv_bytes": 3 << 20} for i in range(8)]
    write_metrics(paths, 0, 0, BEGAN, steps)
    page = drawn(paths, capsys)
    (data,) = page.data
    assert page.tags.count("svg") == page.tags.count("figure") == len(data["figures"]) == 6
    assert {len(data[name]) for name in ("left", "right", "time")} == {4}
    assert data["time"][1] == "0:01  (22:13:21 UTC)"
    assert all(len(values) == 4 for figure in data["figures"] for _, _, values, *_ in figure)
    assert hover(page, 0)["live"] == [5, 6, 7, 8]
    assert hover(page, 1) == {"memory": [50] * 4, "cap": [50] * 4}
    assert hover(page, 2) == {"held": [3] * 4, "may be held (held and headroom)": [4] * 4} | {
        "memory.max_kv_bytes": [None] * 4
    }
    assert hover(page, 4) == {"median": [500] * 4, "p95": [500] * 4, "slowest": [500] * 4, "budget": [400] * 4}
    assert hover(page, 5)["generated"] == [10] * 4
    assert "steps over budget 100 %" in page.text


def test_several_workers_have_a_lane_and_charts_each(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    for worker in range(3):
        write_metrics(paths, worker, 0, BEGAN, [{"reason": ("hold", "cap", "new")[worker], "live_rows": 2}] * 6)
    page = drawn(paths, capsys)
    assert page.tags.count("details") == 3
    assert len(page.data) == 4
    assert hover(page, 0)["live"] == [6, 6, 6]
    lanes = [(name, {kinds[value] for value in values}) for name, _, values, kinds in page.data[0]["figures"][1]]
    assert lanes == [("worker 0", {"hold"}), ("worker 1", {"cap"}), ("worker 2", {"new"})]
    assert hover(page, 1, section=2) == {"cap": [100] * 3}


def test_attempts_are_named_and_pauses_told(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    execution = {"host": "node7", "started": "2023-11-14T22:13:00+00:00"}
    attempts = [
        {"batcher": {"name": "sla", "latency_budget_ms": budget}, "memory": {"max_kv_bytes": 2 << 30}} | execution
        for budget in (450.0, 800.0, None)
    ]
    change_run(paths, attempts=attempts)
    for attempt, began in enumerate((BEGAN, BEGAN + 3725, BEGAN + 90_000)):
        write_metrics(paths, 0, attempt, began, [{}] * 10)
    page = drawn(paths, capsys)
    text = page.text
    assert "1 worker · 3 attempts" in text
    assert "pause 1:02:00" in text
    assert "pause 23:57:50" in text
    assert text.count("attempt 1 ") == 5
    assert "steps over budget 50 % of 450 ms or 800 ms" in text
    assert "1 2023-11-14 22:13:00 node7 1 sla 800 ms 2 GiB 0:05 50 10.0 500, 500, 500 ms 0 % 0" in text
    assert "2 2023-11-14 22:13:00 node7 1 sla none 2 GiB 0:05 50 10.0 500, 500, 500 ms 0 " in text
    assert hover(page, 4)["budget"] == [450] * 5 + [800] * 5 + [None] * 5


def test_preemption_and_running_out_of_memory_are_marked(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(paths, 0, 0, BEGAN, [{"reason": "memory"}] * 8)
    page = drawn(paths, capsys)
    assert "preempted rows 0 out of memory 0 times" in page.text
    assert not [value for _, value in page.attributes if value in ("mark red", "diamond red")]
    reasons = ["memory"] * 4 + ["oom"] * 4 + ["hold"] * 4 + ["oom"] * 2
    steps = [{"reason": reason, "preempted_rows": 3 * (reason == "hold")} for reason in reasons]
    for step, failures in ((4, 1), (13, 2)):
        steps[step]["out_of_memory_events"] = failures
    write_metrics(paths, 0, 0, BEGAN + 4, steps)
    page = drawn(paths, capsys)
    text = page.text
    assert "preempted rows 12 out of memory 3 times" in text
    assert "preempted (at most 6 in a bin)" in text
    assert [value for _, value in page.attributes].count("mark red") == 2
    assert hover(page, 1)["preempted"] == [0] * 8 + [6, 6, 0]


def test_a_run_that_goes_on(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(paths, 0, 0, BEGAN, [{}] * 4)
    records = read_shard(paths.shard(1, "parquet")).to_pylist()
    for shard in (1, 3):
        paths.manifest(shard).unlink()
    paths.work.mkdir(exist_ok=True)
    lines = b"".join(encode_record(Record(**record)) for record in records[:5])
    paths.part(1).write_bytes(lines[:-9])  # the last one was not written to its end
    text = drawn(paths, capsys).text
    assert "not complete ·" in text
    assert "samples 16 of 20; 2 of 4 shards" in text


def test_step_times_that_were_not_counted(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [a_line(time=BEGAN + i) for i in range(3)]
    for line in lines:
        del line["step_ms_counts"]
    paths.metrics(0).write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = drawn(paths, capsys)
    assert hover(page, 4) == {"mean": [250] * 3, "slowest": [300.5] * 3, "budget": [None] * 3}
    assert "step time p50 ? p95 ?, p99 ?" in page.text


def test_odd_values_in_run_json_are_no_limits(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    attempts: list[Any] = ["x", None, {"batcher": 3}, {"batcher": {"latency_budget_ms": "fast"}, "memory": {}}]
    change_run(paths, attempts=attempts, config=[], packages=None)
    for attempt in range(6):
        write_metrics(paths, 0, attempt, BEGAN + 10 * attempt, [{}] * 4)
    assert "steps over budget" not in drawn(paths, capsys).text


# -- charts ----------------------------------------------------------------------------------------------


def history_of(paths: RunPaths) -> History:
    write_metrics(paths, 0, 0, BEGAN, [{}] * 200)
    return read_history(paths, {})


def figure(history: History, *series: Series) -> str:
    return chart("Rows", "", TimeAxis(history.spans), (history.starts, history.ends), series)


def test_what_does_not_lead_or_stands_out_is_cut_off(paths: RunPaths) -> None:
    history = history_of(paths)
    steady, spike = np.full(100, 10.0), np.full(100, 10.0)
    spike[0] = 5000
    assert "(cut off; up to 5,000)" in figure(history, Series("a", spike, "blue"))
    assert "cut off" not in figure(history, Series("a", np.linspace(0, 5000, 100), "blue"))
    both = figure(history, Series("a", steady, "blue"), Series("b", 100 * steady, "red", leading=False))
    assert '<li><i class="key line blue"></i>a</li>' in both
    assert "b (cut off; up to 1,000)" in both
    near = figure(history, Series("a", steady, "blue"), Series("b", 1.4 * steady, "red", leading=False))
    assert "cut off" not in near


@pytest.mark.parametrize("top", [0.0, 5e-324, 0.013, 1.0, 3.0, 7.0, 39.0, 41.0, 99.0, 100.0, 12345.0, 1e15])
def test_scales_have_few_round_steps_and_hold_all(paths: RunPaths, top: float) -> None:
    text = figure(history_of(paths), Series("a", np.full(100, top), "blue", "area"))
    labels = [float(label.replace(",", "")) for label in re.findall(r'text-anchor="end">([^<]*)</text>', text)]
    assert 3 <= len(labels) <= 7
    assert labels[0] == 0
    assert labels[-1] >= top
    assert "cut off" not in text
    assert len(set(np.diff(labels).round(12))) == 1
    heights = [float(y) for y in re.findall(r"[MV]\S* ?(-?[\d.]+)", text)]
    assert all(0 <= y <= 170 for y in heights)


def test_lines_are_broken_where_nothing_is_known(paths: RunPaths) -> None:
    history = history_of(paths)
    values = np.full(100, 10.0)
    values[40:60] = math.nan
    path = re.findall(r'class="line blue" d="([^"]*)"', figure(history, Series("a", values, "blue")))[0]
    assert path.count("M") == 2


def test_pauses_are_narrow_and_times_can_be_read() -> None:
    spans = [Span(0, 100), Span(10_000, 10_300), Span(10_310, 10_311)]
    axis = TimeAxis(spans)
    xs = axis.x(np.array([0, 100, 10_000, 10_300, 10_310, 10_311]))
    assert (xs[0], xs[-1]) == (LEFT, pytest.approx(RIGHT))
    assert (np.diff(xs) > 0).all()
    assert xs[3] - xs[2] == pytest.approx(3 * (xs[1] - xs[0]))
    assert [(round(right - left), seconds) for left, right, seconds in axis.pauses()] == [(24, 9900), (24, 10)]
    ticks = list(axis.ticks())
    assert 5 <= len(ticks) <= 15
    assert min(np.diff([x for x, _ in ticks])) >= 60
    assert [name for _, name in ticks[:4]] == ["0:00", "1:00", "2:47:00", "2:48:00"]


def test_many_attempts_leave_room_for_what_ran() -> None:
    axis = TimeAxis([Span(100.0 * i, 100.0 * i + 10) for i in range(500)])
    widths = [right - left for left, right, _ in axis.pauses()]
    assert sum(widths) == pytest.approx(0.35 * (RIGHT - LEFT))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (9.6, "0:10"), (65, "1:05"), (3599, "59:59"), (3600, "1:00:00"), (180_000, "2 days, 2:00:00")],
)
def test_durations(seconds: float, text: str) -> None:
    assert clock(seconds) == text
