"""Metrics lines and the summary."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from rollout.records import FinishReason, Record
from rollout.run_dir.metrics import MetricsWriter, active_workers, read_lines, read_metrics
from rollout.run_dir.paths import RunPaths
from tests.support.jobs import report_of


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(paths: RunPaths, worker: int = 0) -> list[dict[str, object]]:
    return [json.loads(line) for line in paths.metrics(worker).read_text().splitlines()]


def a_record(sample: int, finish_reason: FinishReason, reward: float | None) -> Record:
    return Record(
        row_id="a",
        sample=sample,
        prompt_ids=[1],
        completion_ids=[2],
        text="",
        logprobs=[0.0],
        sampler_logprobs=[0.0],
        finish_reason=finish_reason,
        reward=reward,
    )


def test_line_sums_up_a_second(tmp_path: Path) -> None:
    paths, clock = RunPaths(tmp_path), Clock()
    with MetricsWriter(
        paths.metrics(2), worker=2, attempt=1, clock=clock, now=lambda: 1000.0, device="GPU-7"
    ) as metrics:
        for step in range(20):
            clock.now += 0.125
            metrics.step(
                report_of(
                    step,
                    live_rows=step + 1,
                    waiting_rows=0 if step == 0 else 4,
                    reason="hold" if step % 4 else "memory",
                    step_ms=float(step),
                    new_tokens=2,
                    preempted_rows=step % 2,
                )
            )
            for sample in range(step % 2):
                metrics.record(a_record(sample, "length" if step == 19 else "stop", reward=0.25))
            metrics.record(a_record(0, "error", reward=None))
    lines = lines_of(paths, 2)
    assert [line["steps"] for line in lines] == [8, 8, 4]
    assert lines[0] == {
        "time": 1000.0,
        "worker": 2,
        "attempt": 1,
        "host": socket.gethostname(),
        "device": "GPU-7",
        "seconds": 1.0,
        "steps": 8,
        "live_rows": 8,
        "live_rows_min": 2,
        "live_rows_max": 8,
        "paused_rows": 0.0,
        "waiting_rows": 4,
        "row_target": 6,
        "reason": "hold",
        "reasons": {"memory": 2, "hold": 6},
        "kv_tokens": 100,
        "kv_bytes": 4096,
        "kv_bytes_max": 4096,
        "headroom_bytes": 1 << 20,
        "prefill_tokens": 0,
        "new_tokens": 16,
        "preempted_rows": 4,
        "out_of_memory_events": 0,
        "step_ms": 3.5,
        "step_ms_max": 7.0,
        "step_ms_counts": {f"{step}.0": 1 for step in range(8)},
        "finish_reasons": {"stop": 4, "error": 8},
        "rewards": 4,
        "reward_sum": 1.0,
        "tok_s": 16.0,
    }
    assert [line["finish_reasons"] for line in lines[1:]] == [
        {"stop": 4, "error": 8},
        {"stop": 1, "length": 1, "error": 4},
    ]
    assert lines[2]["new_tokens"] == 8


def test_step_times_are_counted_by_two_digits_rounded_up(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    with MetricsWriter(paths.metrics(0), 0, 0) as metrics:
        for step, ms in enumerate([0.0001, 0.07, 2.0, 2.01, 2.1, 80.0, 123.4, 129.9, 5000.0]):
            metrics.step(report_of(step, step_ms=ms))
    counts = {"0.0": 1, "0.07": 1, "2.0": 1, "2.1": 2, "80.0": 1, "130.0": 2, "5000.0": 1}
    assert lines_of(paths)[0]["step_ms_counts"] == counts


def test_worker_without_steps_writes_no_line(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    with MetricsWriter(paths.metrics(0), 0, 0):
        pass
    assert lines_of(paths) == []


def test_attempts_append_and_torn_lines_are_skipped(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for attempt in range(3):
        with MetricsWriter(paths.metrics(0), 0, attempt) as metrics:
            metrics.step(report_of(0))
        content = paths.metrics(0).read_bytes()
        if attempt == 1:
            paths.metrics(0).write_bytes(content[:-20])
    assert [line["attempt"] for line in read_metrics(paths)] == [0, 2]
    assert [line and line["attempt"] for line in read_lines(paths)] == [0, None, 2]


def test_last_line_is_written_when_the_engine_fails(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)

    def fail() -> None:
        with MetricsWriter(paths.metrics(0), 0, 0) as metrics:
            metrics.step(report_of(0))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert len(lines_of(paths)) == 1


def test_workers_that_write_no_lines_any_more_are_not_active(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert active_workers(paths) == 1
    for worker in range(3):
        with MetricsWriter(paths.metrics(worker), worker, 0) as metrics:
            metrics.step(report_of(0))
    assert active_workers(paths) == 3
    written = paths.metrics(0).stat().st_mtime
    os.utime(paths.metrics(1), (written - 1000, written - 1000))
    assert active_workers(paths) == 2
