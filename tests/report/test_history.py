"""Metrics read back: lines, workers, attempts and bins."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest

from rollout.report.history import MOST_BINS, read_history
from rollout.report.metric_lines import Line, Span
from rollout.report.series import Limits, quantile, share_above, sum_tracks
from rollout.run_dir.metrics import read_metrics
from rollout.run_dir.paths import RunPaths
from tests.support.report import BEGAN, a_line, drawn, write_metrics


def test_line_is_parsed() -> None:
    line = Line.of(a_line(worker=3, attempt=2))
    assert line is not None
    assert (line.worker, line.attempt, line.span, line.headroom_bytes) == (3, 2, Span(BEGAN - 1, BEGAN), -12)
    assert line.reasons == {"hold": 3, "memory": 1}
    assert line.step_ms_counts == {250.0: 3, 310.0: 1}


def test_line_of_an_earlier_version_is_parsed() -> None:
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
def test_line_with_an_invalid_value_is_rejected(values: dict[str, Any]) -> None:
    assert Line.of(a_line()) is not None
    assert Line.of(a_line(**values)) is None


def test_line_without_a_number_is_rejected() -> None:
    for name in ("time", "seconds", "steps", "headroom_bytes", "new_tokens", "step_ms"):
        values = a_line()
        del values[name]
        assert Line.of(values) is None


def test_torn_lines_are_skipped_and_counted(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_history_sums_workers_and_separates_attempts_and_pauses(paths: RunPaths) -> None:
    for worker, rows in ((0, 4), (1, 6)):
        steps = [{"live_rows": rows, "row_target": rows + 1, "new_tokens": rows, "kv_bytes": 100 * rows}] * 20
        write_metrics(paths, worker, 0, BEGAN, steps)
    write_metrics(paths, 0, 1, BEGAN + 3610, [{"live_rows": 2, "preempted_rows": 1, "kv_bytes": 200}] * 10)
    history = read_history(paths, {0: Limits(max_kv_bytes=450)})
    assert history.spans == [Span(BEGAN, BEGAN + 10), Span(BEGAN + 3610, BEGAN + 3615)]
    assert len(history.starts) == 15
    both = sum_tracks(history.tracks.values())
    np.testing.assert_allclose(both.level("live_rows"), [10] * 10 + [2] * 5)
    np.testing.assert_allclose(both.level("row_target"), [12] * 10 + [6] * 5)
    np.testing.assert_allclose(both.rate("new_tokens"), [20] * 10 + [10] * 5)
    np.testing.assert_allclose(both.level("max_kv_bytes"), [900] * 10 + [math.nan] * 5)
    assert both.preempted_rows.tolist() == [0] * 10 + [2] * 5
    assert np.isnan(history.tracks[1].level("live_rows")[10:]).all()
    first, second = history.attempts.values()
    assert (first.seconds, first.workers, first.new_tokens) == (10, {0, 1}, 200)
    assert (second.seconds, second.workers, second.preempted_rows) == (5, {0}, 10)


def test_headroom_of_one_memory_counts_once(paths: RunPaths) -> None:
    workers = [("a", "cpu", 500), ("a", "cpu", 700), ("a", "GPU-1", 90), ("b", "cpu", 1000), ("b", "cpu", -4)]
    for worker, (_, device, headroom) in enumerate(workers):
        write_metrics(paths, worker, 0, BEGAN, [{"headroom_bytes": headroom}] * 6, device=device)
        lines = [json.loads(line) for line in paths.metrics(worker).read_text().splitlines()]
        renamed = [json.dumps(line | {"host": workers[worker][0]}) + "\n" for line in lines]
        paths.metrics(worker).write_text("".join(renamed))
    history = read_history(paths, {})
    both = sum_tracks(history.tracks.values())
    np.testing.assert_allclose(both.headroom_bytes(), [600 + 90 + 500] * 3)
    np.testing.assert_allclose(history.tracks[3].headroom_bytes(), [1000] * 3)


def test_headroom_of_lines_without_a_host_counts_once(paths: RunPaths) -> None:
    lines = [a_line(worker=worker, headroom_bytes=1000) for worker in range(3)]
    paths.metrics(0).write_text("".join(json.dumps(line) + "\n" for line in lines))
    both = sum_tracks(read_history(paths, {}).tracks.values())
    np.testing.assert_allclose(both.headroom_bytes(), [1000])


def test_bins_preserve_totals(paths: RunPaths) -> None:
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
    both = sum_tracks(history.tracks.values())
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


def test_line_of_zero_seconds_counts(paths: RunPaths) -> None:
    write_metrics(paths, 0, 0, BEGAN, [{"new_tokens": 3}], step_s=0.0)
    history = read_history(paths, {})
    assert history.attempts[0].new_tokens == 3
    assert len(history.starts) == 1


def test_quantile_and_share_above_of_counts() -> None:
    counts = {10.0: 50.0, 20.0: 45.0, 30.0: 4.0, 1000.0: 1.0}
    assert [quantile(counts, q) for q in (0.0, 0.5, 0.51, 0.95, 0.99, 1.0)] == [10, 10, 20, 20, 30, 1000]
    assert quantile({2.0: 0.1, 1.0: 0.7, 3.0: 0.2}, 1.0) == 3  # as shares of steps add up
    assert math.isnan(quantile({}, 0.5))
    assert share_above(counts, 20) == 0.05
    assert math.isnan(share_above({}, 20))
