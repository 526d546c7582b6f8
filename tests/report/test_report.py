"""The HTML report: its totals, its text, and that it is one safe file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollout.errors import Exit
from rollout.job.job import run_job
from rollout.records import RECORD_COLUMNS, Record
from rollout.report.__main__ import main
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import read_run
from rollout.run_dir.sealed_json import seal, unseal
from rollout.run_dir.shards import read_shard
from rollout.verify import verify
from tests.support.jobs import config_of, load_fake, write_part
from tests.support.report import BEGAN, Page, a_line, change_run, drawn, hover, write_attempts, write_metrics

# -- the command -----------------------------------------------------------------------------------------


def test_report_of_a_complete_run(tmp_path: Path) -> None:
    config = config_of(tmp_path, "data.limit=30", "sampling.max_new_tokens=77", "batcher.latency_budget_ms=50")
    assert run_job(config, load_fake()) == Exit.COMPLETE
    command = [sys.executable, "-m", "rollout.report", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'out' / 'report.html'}\n"
    text = Page((tmp_path / "out" / "report.html").read_text()).text
    for expected in (
        "30 of 30; 1 of 1 shards",
        "max_new_tokens 77",
        "latency_budget_ms 50.0",
        "name predictive",
        "complete ·",
    ):
        assert expected in text
    assert verify(tmp_path / "out").complete


@pytest.mark.parametrize("missing", ["folder", "run"])
def test_folder_without_a_run_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    folder = tmp_path / "elsewhere"
    if missing == "run":
        folder.mkdir()
    assert main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert str(folder) in captured.err
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("lines", ["", '{"time": 1, "wor\n[1]\n'])
def test_run_without_metrics_shows_its_data(paths: RunPaths, capsys: pytest.CaptureFixture[str], lines: str) -> None:
    paths.metrics(0).write_text(lines)
    text = drawn(paths, capsys).text
    assert "complete · no metrics, hence no charts over time" in text
    assert "samples 20 of 20" in text
    assert "Samples to read" in text
    assert "Over time" not in text


def test_output_option_chooses_the_file(paths: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(paths, 0, 0, BEGAN, [{}])
    capsys.readouterr()
    assert main([str(paths.root), "--output", str(tmp_path / "picture.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'picture.html'}\n"
    assert not paths.report.exists()
    assert main([str(paths.root), "--output", str(tmp_path / "no" / "picture.html")]) == 2
    assert "choose another file with --output" in capsys.readouterr().err


# -- one safe file ---------------------------------------------------------------------------------------


def test_page_is_self_contained(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_everything_read_is_escaped(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "</script></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\ud800"
    config = {group: {evil: evil, "path": evil} for group in ("model", "data", "sampling", "output", "reward")}
    attempt = dict.fromkeys(("started", "host", "device"), evil) | {"batcher": {"name": evil, evil: [evil]}}
    change_run(paths, config=config, packages={evil: evil})
    write_attempts(paths, [attempt])
    manifest = unseal(paths.manifest(0).read_bytes()) | {"errors": {evil: 1}, "finish_reasons": {evil: 3}}
    paths.manifest(0).write_bytes(seal(manifest))
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


# -- what is drawn ---------------------------------------------------------------------------------------


def test_page_holds_all_values_for_the_pointer(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_attempts(paths, [{"batcher": {"latency_budget_ms": 400}, "memory": {"max_kv_bytes": None}}])
    steps = [{"live_rows": 5 + i // 2, "reason": "cap" if i % 2 else "memory", "kv_bytes": 3 << 20} for i in range(8)]
    write_metrics(paths, 0, 0, BEGAN, steps)
    page = drawn(paths, capsys)
    (data,) = page.data
    assert len(data["figures"]) == page.tags.count("figure") - 2 == 7  # and the histograms of lengths
    assert {len(data[name]) for name in ("left", "right", "time")} == {4}
    assert data["time"][1] == "0:01  (22:13:21 UTC)"
    assert all(len(values) == 4 for figure in data["figures"] for _, _, values, *_ in figure)
    assert hover(page, 0)["live"] == [5, 6, 7, 8]
    assert hover(page, 1) == {"memory": [50] * 4, "cap": [50] * 4}
    assert hover(page, 2) == {"held": [3] * 4, "limit (memory.max_kv_bytes)": [None] * 4}
    assert hover(page, 4) == {"left on the machine, above the reserve": [1] * 4}
    assert hover(page, 5) == {"median": [500] * 4, "p95": [500] * 4, "slowest": [500] * 4, "budget": [400] * 4}
    assert hover(page, 6)["generated"] == [10] * 4
    assert "steps over budget 100 %" in page.text


def test_each_worker_has_a_lane_and_charts(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    for worker in range(3):
        write_metrics(paths, worker, 0, BEGAN, [{"reason": ("hold", "cap", "new")[worker], "live_rows": 2}] * 6)
    page = drawn(paths, capsys)
    assert page.tags.count("details") == 3
    assert len(page.data) == 4
    assert hover(page, 0)["live"] == [6, 6, 6]
    lanes = [(name, {kinds[value] for value in values}) for name, _, values, kinds in page.data[0]["figures"][1]]
    assert lanes == [("worker 0", {"hold"}), ("worker 1", {"cap"}), ("worker 2", {"new"})]
    assert hover(page, 1, section=2) == {"cap": [100] * 3}


def test_attempts_and_pauses_are_labelled(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    execution = {"host": "node7", "started": "2023-11-14T22:13:00+00:00"}
    attempts = [
        {"batcher": {"name": "sla", "latency_budget_ms": budget}, "memory": {"max_kv_bytes": 2 << 30}} | execution
        for budget in (450.0, 800.0, None)
    ]
    write_attempts(paths, attempts)
    for attempt, began in enumerate((BEGAN, BEGAN + 3725, BEGAN + 90_000)):
        write_metrics(paths, 0, attempt, began, [{}] * 10)
    page = drawn(paths, capsys)
    text = page.text
    assert "1 worker · 3 attempts" in text
    assert "pause 1:02:00" in text
    assert "pause 23:57:50" in text
    assert text.count("attempt 1 ") == 6
    assert "steps over budget 50 % of 450 ms or 800 ms" in text
    assert "1 2023-11-14 22:13:00 node7 1 sla 800 ms 2 GiB 0:05 50 10.0 500, 500, 500 ms 0 % 0" in text
    assert "2 2023-11-14 22:13:00 node7 1 sla none 2 GiB 0:05 50 10.0 500, 500, 500 ms 0 " in text
    assert hover(page, 5)["budget"] == [450] * 5 + [800] * 5 + [None] * 5


def test_preemption_and_allocation_failures_are_marked(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(paths, 0, 0, BEGAN, [{"reason": "memory"}] * 8)
    page = drawn(paths, capsys)
    assert "preempted samples 0 out of memory 0 times" in page.text
    assert not [value for _, value in page.attributes if value in ("mark red", "dot red")]
    reasons = ["memory"] * 4 + ["oom"] * 4 + ["hold"] * 4 + ["oom"] * 2
    steps = [{"reason": reason, "preempted_rows": 3 * (reason == "hold")} for reason in reasons]
    for step, failures in ((4, 1), (13, 2)):
        steps[step]["out_of_memory_events"] = failures
    write_metrics(paths, 0, 0, BEGAN + 4, steps)
    page = drawn(paths, capsys)
    text = page.text
    assert "preempted samples 12 out of memory 3 times" in text
    assert "preempted (at most 6 in a bin)" in text
    assert [value for _, value in page.attributes].count("mark red") == 2
    assert hover(page, 1)["preempted"] == [0] * 8 + [6, 6, 0]


def test_report_of_an_unfinished_run_counts_part_files(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(paths, 0, 0, BEGAN, [{}] * 4)
    records = read_shard(paths.shard(1, "parquet")).to_pylist()
    for shard in (1, 3):
        paths.manifest(shard).unlink()
    written = [Record(**{name: record[name] for name in RECORD_COLUMNS}) for record in records[:5]]
    part = write_part(read_run(paths), 1, written)
    part.write_bytes(part.read_bytes()[:-9])  # the last one was not written to its end
    text = drawn(paths, capsys).text
    assert "not complete ·" in text
    assert "samples 16 of 20; 2 of 4 shards" in text


def test_lines_without_step_time_counts_show_the_mean(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [a_line(time=BEGAN + i) for i in range(3)]
    for line in lines:
        del line["step_ms_counts"]
    paths.metrics(0).write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = drawn(paths, capsys)
    assert hover(page, 5) == {"mean": [250] * 3, "slowest": [300.5] * 3, "budget": [None] * 3}
    assert "step time p50 ? p95 ?, p99 ?" in page.text


def test_invalid_limits_of_attempts_are_ignored(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    attempts: list[Any] = [{}, {"batcher": 3}, {"batcher": {"latency_budget_ms": "fast"}, "memory": {}}]
    write_attempts(paths, attempts)
    change_run(paths, config=[], packages=None)
    for attempt in range(6):
        write_metrics(paths, 0, attempt, BEGAN + 10 * attempt, [{}] * 4)
    assert "steps over budget" not in drawn(paths, capsys).text
