"""What a run has cost: killed attempts count by their metrics, and nothing is counted twice."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rollout.errors import Exit
from rollout.job.job import run_job
from rollout.job.retrying import Retry
from rollout.run_dir.attempts import begin_attempt, end_attempt, read_attempts
from rollout.run_dir.costs import cost_lines, cost_of, write_cost
from rollout.run_dir.file_system import LOCAL, LocalFileSystem
from rollout.run_dir.metrics import read_metrics
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import RunDir, read_run, read_run_json
from rollout.run_dir.summary import read_totals, summarise
from tests.support.jobs import FakeEngine, config_of, load_fake, refuse_to_load

START = 1_700_000_000.0


def line(
    attempt: int, time: float, tokens: int, prefill: int = 0, steps: int = 10, step_ms: float = 50.0
) -> dict[str, Any]:
    return {
        "attempt": attempt,
        "time": START + time,
        "seconds": 1.0,
        "device": "GPU-1 GPU-2",
        "steps": steps,
        "step_ms": step_ms,
        "new_tokens": tokens,
        "prefill_tokens": prefill,
        "live_rows_max": 1,
        "live_rows_min": None,
    }


def began(paths: RunPaths, at: float, processes: int = 1, loading: float = 0.0) -> int:
    started = datetime.fromtimestamp(START + at, UTC).isoformat(timespec="seconds")
    described = {"started": started, "processes": processes, "loading_seconds": loading}
    return begin_attempt(LOCAL, paths, described, "one")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A complete run whose attempts and metrics are removed."""
    config = config_of(tmp_path, "data.limit=6", "sampling.n=2", "output.rows_per_shard=3")
    assert run_job(config, load_fake()) == Exit.COMPLETE
    run = read_run(RunPaths(tmp_path / "out"))
    run.files.remove_folder(run.paths.attempts)
    run.files.remove_folder(run.paths.root / "metrics")
    return run


def write_metrics(paths: RunPaths, *ranks: list[dict[str, Any]]) -> None:
    (paths.root / "metrics").mkdir()
    for rank, lines in enumerate(ranks):
        paths.metrics(rank).write_text("".join(json.dumps(values) + "\n" for values in lines) + '{"torn')


def test_killed_attempts_cost_what_their_metrics_say(run: RunDir) -> None:
    useful = read_totals(run).completion_tokens
    prompts = read_totals(run).prompt_tokens // 2
    # Two processes load for 20 s, and are killed after 30 s; an hour later one goes on, and ends.
    assert began(run.paths, 0, processes=2, loading=20) == 0
    assert began(run.paths, 3600, loading=15) == 1
    measured = {"waiting_seconds": 4.0, "committing_seconds": 2.5, "slowest_shard": {"shard": 1, "seconds": 9.0}}
    end_attempt(LOCAL, run.paths, 1, {"ended": START + 3650, "cost": measured}, "one")
    write_metrics(
        run.paths,
        [line(0, 1, useful, prompts), line(0, 30, 7), line(1, 3610, useful, 11, steps=4, step_ms=250)],
        [line(0, 25, 5)],
    )
    cost = cost_of(run, read_totals(run), read_metrics(run.paths))
    assert cost is not None
    assert (cost.attempts, cost.interrupted) == (2, 1)
    assert cost.device_seconds == {"gpu": 2 * 2 * (20 + 30) + 2 * (15 + 50)}
    assert cost.wall_seconds == 20 + 3650
    assert cost.loading_seconds == 2 * 20 + 15
    assert cost.generating_seconds == 3 * 0.5 + 1
    assert (cost.waiting_seconds, cost.committing_seconds) == (4.0, 2.5)
    assert cost.slowest_shard == {"shard": 1, "seconds": 9.0}
    assert (cost.generated_tokens, cost.useful_tokens, cost.lost_tokens) == (2 * useful + 12, useful, useful + 12)
    assert (cost.prefilled_tokens, cost.prefilled_again_tokens) == (prompts + 11, 11)
    lines = cost_lines(cost)
    assert lines["cost"].startswith("5 min 30 s on gpu (55.0 s loading, 2.5 s in steps, 4.0 s waiting), 1 h 01 min")
    assert lines["lost"].startswith(f"2 attempts, 1 killed or still running; {useful + 12:,} of")


def test_an_attempt_without_a_sign_costs_its_loading(run: RunDir) -> None:
    began(run.paths, 0, loading=30)
    write_metrics(run.paths, [])
    cost = cost_of(run, read_totals(run), read_metrics(run.paths))
    assert cost is not None
    assert (cost.device_seconds, cost.wall_seconds, cost.interrupted) == ({"unknown": 30.0}, 30.0, 1)
    # More tokens than the metrics know of are no loss.
    assert cost.lost_tokens == 0


def test_a_job_writes_its_cost_once_and_a_retry_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, "data.limit=6", "sampling.n=2", "output.rows_per_shard=3")
    with pytest.raises(RuntimeError):
        run_job(config, load_fake(FakeEngine(fail_after=8)))
    paths = RunPaths(tmp_path / "out")
    assert "cost" not in read_run_json(paths)
    assert run_job(config, load_fake()) == Exit.COMPLETE
    run = read_run(paths)
    cost = read_run_json(paths)["cost"]
    assert (cost["attempts"], cost["interrupted"]) == (2, 1)
    assert cost["useful_tokens"] == read_totals(run).completion_tokens
    assert 0 < cost["device_seconds"]["cpu"] <= cost["wall_seconds"] + 2
    assert cost["slowest_shard"]["seconds"] > 0
    assert ["ended" in attempt for attempt in read_attempts(LOCAL, paths)] == [False, True]
    assert "2 attempts, 1 killed or still running" in capsys.readouterr().out
    before = paths.run.read_bytes()
    assert run_job(config, refuse_to_load) == Exit.COMPLETE
    assert run_job(config, refuse_to_load, retry=Retry()) == Exit.COMPLETE
    assert paths.run.read_bytes() == before
    summary = summarise(run)
    assert summary.cost is not None
    assert replace(summary.cost, wall_seconds=0).attempts == 2


@pytest.mark.parametrize("damaged", ["attempts/00000.json", "metrics/rank-00000.jsonl"])
def test_a_damaged_file_of_figures_stops_no_job(
    tmp_path: Path, damaged: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, "data.limit=6", "sampling.n=2", "output.rows_per_shard=3")
    assert run_job(config, load_fake()) == Exit.COMPLETE
    path = tmp_path / "out" / damaged
    # One flipped bit in each name: "steps" becomes "rteps", "started" "rtarted".
    path.write_bytes(path.read_bytes().replace(b'"st', b'"rt'))
    assert run_job(config, refuse_to_load) == Exit.COMPLETE
    (tmp_path / "out/shards/00001.parquet").unlink()
    assert run_job(config, load_fake()) == Exit.COMPLETE
    assert "\ncost: " in capsys.readouterr().out


def test_an_attempt_whose_file_is_damaged_meanwhile_ends_in_peace(run: RunDir) -> None:
    began(run.paths, 0)
    path = run.paths.attempt(0)
    path.write_bytes(path.read_bytes().replace(b"started", b"rtarted"))
    damaged = path.read_bytes()
    end_attempt(LOCAL, run.paths, 0, {"ended": START}, "one")
    assert path.read_bytes() == damaged
    assert list(read_attempts(LOCAL, run.paths)) == []


def test_cost_is_written_while_another_worker_clears_the_work_of_a_complete_run(run: RunDir) -> None:
    class ClearedMeanwhile(LocalFileSystem):
        def rename(self, source: Path, target: Path) -> None:
            run.clear_work()
            super().rename(source, target)

    began(run.paths, at=0)
    cost = summarise(run).cost
    assert cost is not None
    write_cost(replace(run, files=ClearedMeanwhile()), cost, "one")
    assert read_run_json(run.paths)["cost"]["generated_tokens"] == cost.generated_tokens
    assert not run.paths.work.exists()
    assert [path.name for path in run.paths.root.iterdir() if path.name.startswith(".")] == []
