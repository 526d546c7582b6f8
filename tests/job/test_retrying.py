"""A retry: what was in error is generated or scored again, and nothing that was good is lost or done twice."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rollout.cli.retry import run_retry
from rollout.config.schema import Config
from rollout.data.prompts import read_prompts
from rollout.errors import Exit, InputError
from rollout.job.job import run_job
from rollout.job.retrying import Opened, Retry
from rollout.job.rewards import load_reward
from rollout.job.stop_signals import Stopped
from rollout.records import Record
from rollout.requests import Request, StepReport
from rollout.retry import main as retry_main
from rollout.run_dir.file_system import LOCAL, FileSystem
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.record_table import shard_schema
from rollout.run_dir.run import read_run
from rollout.run_dir.stored_records import stored_records
from rollout.verify import verify
from tests.support.faulty_files import Fault, FaultyFiles
from tests.support.jobs import (
    FakeEngine,
    config_of,
    load_fake,
    read_records,
    refuse_to_load,
    without_attempt,
    write_part,
)
from tests.support.simulated_files import ProcessDied

HERE = "tests.job.test_retrying"
FAILING: set[str] = set()
"""Prompts of which the reward fails."""


def fragile(row: dict[str, Any], text: str) -> float:
    if row["prompt"] in FAILING:
        raise OSError("no answer")
    return len(text) + len(row["prompt"]) / 3


def fragile_many(rows: list[dict[str, Any]], texts: list[str]) -> list[float]:
    return [fragile(row, text) for row, text in zip(rows, texts, strict=True)]


class BrokenEngine(FakeEngine):
    """Fails for some samples, by their row's number and their own."""

    def __init__(self, failing: set[tuple[str, int]], error_class: str = "too_large") -> None:
        super().__init__()
        self.failing = failing
        self.error_class = error_class

    def run(
        self,
        requests: Iterable[Request],
        *,
        on_step: Callable[[StepReport], None] | None = None,
        weights_fixed: bool = False,
        **others: Any,
    ) -> Iterator[Record]:
        for record in super().run(requests, on_step=on_step, weights_fixed=weights_fixed, **others):
            if (record.row_id, record.sample) in self.failing:
                yield replace(
                    record,
                    completion_ids=[],
                    text="",
                    logprobs=[],
                    sampler_logprobs=[],
                    finish_reason="error",
                    error_class=self.error_class,
                    error="It does not fit.",
                )
            else:
                yield record


def job(folder: Path, *overrides: str) -> Config:
    """Return a job of seven rows, two samples each, in shards of three rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"name": f"r{number}", "prompt": f"prompt {number}", "extra": number / 2} for number in range(7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (f"data.path={folder / 'rows.jsonl'}", "data.id_column=name", "sampling.n=2", "output.rows_per_shard=3")
    return config_of(folder, *settings, *overrides)


def retry(config: Config, engine: FakeEngine | None = None, classes: set[str] | None = None) -> tuple[Exit, Retry]:
    asked = Retry(classes)
    return run_job(config, refuse_to_load if engine is None else load_fake(engine), retry=asked), asked


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("logprobs", ["both", "none"])
def test_samples_in_error_alone_are_generated_again(tmp_path: Path, form: str, logprobs: str) -> None:
    settings = (f"output.format={form}", f"output.logprobs={logprobs}", "output.split_reasoning=true")
    whole = job(tmp_path / "whole", *settings)
    assert run_job(whole, load_fake()) == Exit.COMPLETE
    config = job(tmp_path / "retried", *settings)
    failing = {("r1", 0), ("r1", 1), ("r6", 1)}
    assert run_job(config, load_fake(BrokenEngine(failing))) == Exit.ERROR_ROWS
    before = RunPaths(Path(config.output.dir)).manifest(1).read_bytes()
    engine = FakeEngine()
    status, asked = retry(config, engine)
    assert status == Exit.COMPLETE
    assert (set(engine.asked), len(engine.asked)) == (failing, 3)
    assert (asked.shards, asked.generated, asked.scored) == (2, 3, 0)
    found = read_records(tmp_path / "retried" / "out")
    assert without_attempt(found) == without_attempt(read_records(tmp_path / "whole" / "out"))
    assert {(r["row_id"], r["sample"]) for r in found if r["attempt"] == 1} == failing
    # A shard without errors is not touched, and nothing is left over.
    assert RunPaths(Path(config.output.dir)).manifest(1).read_bytes() == before
    assert verify(tmp_path / "retried" / "out").complete
    assert not RunPaths(Path(config.output.dir)).work.exists()


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("function", ["fragile", "fragile_many"])
def test_failed_rewards_are_computed_again_without_a_model(tmp_path: Path, form: str, function: str) -> None:
    batch = ["reward._batch_=3"] if function == "fragile_many" else []
    settings = (f"output.format={form}", f"reward._target_={HERE}.{function}", *batch)
    FAILING.clear()
    whole = job(tmp_path / "whole", *settings)
    assert run_job(whole, load_fake()) == Exit.COMPLETE
    config = job(tmp_path / "retried", *settings)
    FAILING.update({"prompt 0", "prompt 5"})
    assert run_job(config, load_fake()) == Exit.ERROR_ROWS
    FAILING.remove("prompt 0")
    status, asked = retry(config)
    assert status == Exit.ERROR_ROWS
    assert (asked.shards, asked.generated, asked.scored) == (2, 0, 4)
    errors = [(r["row_id"], r["error_class"]) for r in read_records(tmp_path / "retried" / "out") if r["error_class"]]
    assert errors == [("r5", "reward_failed")] * 2
    FAILING.clear()
    assert retry(config)[0] == Exit.COMPLETE
    assert read_records(tmp_path / "retried" / "out") == read_records(tmp_path / "whole" / "out")
    assert verify(tmp_path / "retried" / "out").complete


def test_only_the_named_classes_are_retried(tmp_path: Path) -> None:
    config = job(tmp_path, f"reward._target_={HERE}.fragile")
    FAILING.clear()
    FAILING.add("prompt 2")
    assert run_job(config, load_fake(BrokenEngine({("r0", 0)}))) == Exit.ERROR_ROWS
    FAILING.clear()
    engine = FakeEngine()
    status, asked = retry(config, engine, {"too_large"})
    assert (status, engine.asked) == (Exit.ERROR_ROWS, [("r0", 0)])
    assert (asked.generated, asked.scored) == (1, 0)
    assert verify(tmp_path / "out").complete
    assert retry(config, None, {"no_such"}) == (Exit.ERROR_ROWS, Retry({"no_such"}))
    assert retry(config)[0] == Exit.COMPLETE


def test_what_is_still_in_error_stands_as_an_error_again(tmp_path: Path) -> None:
    config = job(tmp_path)
    failing = {("r3", 1), ("r4", 0)}
    assert run_job(config, load_fake(BrokenEngine(failing))) == Exit.ERROR_ROWS
    assert retry(config, BrokenEngine({("r3", 1)}, "still"))[0] == Exit.ERROR_ROWS
    errors = [(r["row_id"], r["sample"], r["error_class"]) for r in read_records(tmp_path / "out") if r["error_class"]]
    assert errors == [("r3", 1, "still")]
    assert verify(tmp_path / "out").complete


def test_records_in_error_that_an_earlier_attempt_left_do_not_come_back(tmp_path: Path) -> None:
    """A worker that is killed between a commit and the removal of its part file leaves that."""
    config = job(tmp_path)
    assert run_job(config, load_fake(BrokenEngine({("r1", 0)}))) == Exit.ERROR_ROWS
    run = read_run(RunPaths(tmp_path / "out"))
    write_part(run, 0, stored_records(run.paths.shard(0, run.format), list(run.columns), LOCAL))
    engine = FakeEngine()
    assert retry(config, engine)[0] == Exit.COMPLETE
    assert engine.asked == [("r1", 0)]


@dataclass(frozen=True)
class Broken:
    """A run with errors of both kinds."""

    source: Path
    config: Config
    """Of its job."""
    expected: list[dict[str, Any]]
    """The records that it should have."""

    def prepare(self, out: Path, files: FileSystem) -> None:
        """Let a retry set the errors of a copy open, as the first half of its job."""
        prompts = read_prompts(self.config.data, with_columns=True)
        run = replace(read_run(RunPaths(out)), files=files)
        schema = shard_schema(prompts.kept.schema, self.config.output.format)
        Retry().prepare(Opened(run, prompts, schema, load_reward(self.config.reward)))

    def disturb(self, out: Path, number: int, fault: Fault) -> None:
        """Let an operation of a retry fail, and retry again."""
        shutil.rmtree(out)
        shutil.copytree(self.source, out)
        files = FaultyFiles(LOCAL, number, fault)
        with suppress(ProcessDied, OSError):
            self.prepare(out, files)
        engine = FakeEngine()
        status, _ = retry(replace(self.config, output=replace(self.config.output, dir=str(out))), engine)
        assert status == Exit.COMPLETE
        # No good record was lost.
        assert set(engine.asked) <= {("r2", 1)}
        assert without_attempt(read_records(out)) == self.expected
        assert verify(out).complete


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Broken:
    return broken_run(tmp_path_factory.mktemp("broken"))


def broken_run(folder: Path) -> Broken:
    FAILING.clear()
    settings = (f"reward._target_={HERE}.fragile", "output.rows_per_shard=4")
    whole = job(folder / "whole", *settings)
    assert run_job(whole, load_fake()) == Exit.COMPLETE
    config = job(folder, *settings)
    FAILING.update({"prompt 0", "prompt 6"})
    assert run_job(config, load_fake(BrokenEngine({("r2", 1)}))) == Exit.ERROR_ROWS
    FAILING.clear()
    return Broken(folder / "out", config, without_attempt(read_records(folder / "whole" / "out")))


SHARE = 20
"""One in so many operations is tried."""


@pytest.mark.parametrize("fault", [Fault.DIES, Fault.DIES_MIDWAY, Fault.EIO, Fault.EIO_DONE, Fault.ENOSPC])
def test_no_good_record_is_lost_wherever_a_retry_ends(broken: Broken, tmp_path: Path, fault: Fault) -> None:
    untouched = FaultyFiles(LOCAL)
    shutil.copytree(broken.source, tmp_path / "out")
    broken.prepare(tmp_path / "out", untouched)
    operations = untouched.operations
    tried = set(range(1 + random.Random(fault.name).randrange(SHARE), len(operations) + 1, SHARE))
    if fault is Fault.DIES_MIDWAY:
        # Where the shard's file is gone and its manifest is not.
        tried |= {number for number, operation in enumerate(operations, 1) if operation == "rename"}
    for number in sorted(tried):
        print(f"{fault.name} at operation {number}, {operations[number - 1]}")
        broken.disturb(tmp_path / "out", number, fault)


def test_the_command_takes_the_job_from_run_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = job(tmp_path, "sampling.temperature=0.7", "batcher=sla", "batcher.latency_budget_ms=50", "seed=3")
    failing = {("r1", 0), ("r5", 1)}
    assert run_job(config, load_fake(BrokenEngine(failing))) == Exit.ERROR_ROWS
    moved = tmp_path / "moved here"
    shutil.move(config.output.dir, moved)
    engine = FakeEngine()
    seen: list[Config] = []

    def load(config: Config, *others: Any) -> Any:
        seen.append(config)
        return load_fake(engine)(config, *others)

    monkeypatch.setattr("rollout.job.job.load_engine", load)
    assert run_retry([str(moved), "batcher.max_rows=7", "error_class=too_large"]) == Exit.COMPLETE
    assert set(engine.asked) == failing
    (used,) = seen
    assert (used.batcher.name, used.batcher.max_rows, used.batcher.latency_budget_ms) == ("sla", 7, 50)
    assert (used.sampling.temperature, used.seed, used.output.dir) == (0.7, 3, str(moved))
    assert verify(moved).complete


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "names no run"),
        (["OUT", "OUT2"], "several runs"),
        (["OUT", "sampling.n=3"], "sampling.n=3 would change what the run holds"),
        (["OUT", "reward._target_=x.y"], "would change what the run holds"),
        (["OUT", "error_class="], "names no class"),
        (["nowhere"], "nowhere holds no run"),
        (["OUT", "-m"], "no such option"),
    ],
)
def test_wrong_command_lines_are_refused(tmp_path: Path, words: list[str], part: str) -> None:
    config = job(tmp_path)
    run_job(config, load_fake())
    with pytest.raises(InputError, match=part):
        run_retry([word.replace("OUT", config.output.dir) for word in words])


def test_other_data_is_refused_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = job(tmp_path)
    run_job(config, load_fake(BrokenEngine({("r1", 0)})))
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "shards").iterdir()}
    text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text.replace("prompt 2", "another"))
    assert run_retry([config.output.dir]) == Exit.BAD_INPUT
    assert "data.content" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out" / "shards").iterdir()} == before


def test_a_retry_that_is_stopped_at_its_start_names_the_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: list[str]) -> int:
        raise Stopped

    monkeypatch.setattr("rollout.retry.run_retry", stopped)
    assert retry_main(["error_class=too_large", "runs/answers"]) == Exit.RESUMABLE
    assert capsys.readouterr().err == "Stopped: the same command resumes the run in runs/answers.\n"
