"""``python -m rollout.rescore``: the records of a run with other rewards, and nothing else of them changed."""

from __future__ import annotations

import errno
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import rollout.job.rescoring as module
from rollout.errors import Exit
from rollout.job.job import run_job
from rollout.records import Record
from rollout.rescore import main
from rollout.run_dir.shards import COUNTED_COLUMNS, RecordCounts, count_table, read_manifest, read_shard
from rollout.scores import Score, Scores, ScoringStats
from rollout.verify import verify
from tests.support.jobs import FakeEngine, config_of, fake_model, load_fake

HERE = "tests.rollout.test_rescore"
CHANGED = ("reward", "error_class", "error")
ROWS: list[dict[str, Any]] = [
    {"prompt": "one", "answer": 1, "meta": {"a": 1}, "text": "é\u2028"},
    {"prompt": "", "answer": 2.5, "meta": {"b": [1, None]}, "text": None},
    {"prompt": "three", "answer": "3", "meta": None, "text": "x"},
    {"prompt": "unencodable", "answer": None, "meta": {}, "text": "y"},
    {"prompt": "five", "answer": 10**17, "meta": {"a": 1.5}, "text": "z"},
]
SEEN: list[tuple[dict[str, Any], str]] = []


def seen(row: dict[str, Any], text: str, scale: float = 1.0) -> float:
    """Note what the reward is called with."""
    SEEN.append((dict(row), text))
    return scale * len(text) + len(row["prompt"]) / 3


def seen_many(rows: list[dict[str, Any]], texts: list[str]) -> list[float]:
    return [seen(row, text) for row, text in zip(rows, texts, strict=True)]


def fails_for_three(row: dict[str, Any], text: str) -> float:
    if row["prompt"] == "three":
        raise ValueError("no three")
    return 1.0


def slow(row: dict[str, Any], text: str) -> float:
    time.sleep(0.001)
    return float(len(text))


class Reference:
    """Fails for one row."""

    def __init__(self, failing: str) -> None:
        self.failing = failing

    def score(self, records: Sequence[Record], *, temperature: Sequence[float]) -> Scores:
        scores = [
            Score(error_class="too_long", error="It is too long.")
            if record.row_id == self.failing
            else Score([0.0] * len(record.completion_ids))
            for record in records
        ]
        return Scores(tuple(scores), ScoringStats(*[0] * 9, seconds=0.0))


def made(folder: Path, *overrides: str, reference: Reference | None = None) -> Path:
    """Run a job of `ROWS`, two samples each in shards of two rows, and return its directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = (f"data.path={folder / 'rows.jsonl'}", "sampling.n=2", "output.rows_per_shard=2")
    run_job(config_of(folder, *settings, *overrides), load_fake(reference=reference))
    return folder / "out"


def rescore(source: Path, target: Path, *overrides: str, target_function: str = "seen") -> int:
    return main([str(source), f"reward._target_={HERE}.{target_function}", f"output.dir={target}", *overrides])


def records_of(out: Path) -> list[dict[str, Any]]:
    """Read all records; in JSON lines, each shard's columns have the types of its values."""
    files = sorted(path for path in (out / "shards").iterdir() if path.suffix != ".json")
    return [record for path in files for record in read_shard(path).to_pylist()]


def without_rewards(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in CHANGED} for record in records]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("batch", ["null", "3"])
@pytest.mark.parametrize("first", [None, "fails_for_three"])
def test_rewards_are_those_of_a_job_and_all_else_stays(
    tmp_path: Path, form: str, batch: str, first: str | None
) -> None:
    reward = [] if first is None else [f"reward._target_={HERE}.{first}"]
    source = made(tmp_path, f"output.format={form}", *reward)
    function = "seen" if batch == "null" else "seen_many"
    SEEN.clear()
    job = made(
        tmp_path / "job", f"output.format={form}", f"reward._target_={HERE}.{function}", f"reward._batch_={batch}"
    )
    in_job = sorted(SEEN, key=repr)
    SEEN.clear()
    target = tmp_path / "new"
    assert rescore(source, target, f"reward._batch_={batch}", target_function=function) == Exit.ERROR_ROWS
    assert sorted(SEEN, key=repr) == in_job
    assert len(in_job) == 6
    assert records_of(target) == records_of(job)
    assert without_rewards(records_of(target)) == without_rewards(records_of(source))
    assert verify(target).complete
    for path in sorted((source / "shards").glob(f"*.{form}")):
        new = target / "shards" / path.name
        counts = count_table(read_shard(new, COUNTED_COLUMNS))
        manifest = read_manifest(new.with_suffix(".json"))
        assert counts == RecordCounts(**{field.name: getattr(manifest, field.name) for field in fields(counts)})
        if form == "parquet":
            assert pq.read_schema(new).equals(pq.read_schema(path), check_metadata=True)
            kept = [name for name in pq.read_schema(path).names if name not in CHANGED]
            assert pq.read_table(new, columns=kept).equals(pq.read_table(path, columns=kept))
        else:
            for ours, theirs in zip(
                new.read_bytes().split(b"\n")[:-1], path.read_bytes().split(b"\n")[:-1], strict=True
            ):
                pairs = list(zip(json.loads(ours).items(), json.loads(theirs).items(), strict=True))
                assert [a for (a, _), _ in pairs] == [b for _, (b, _) in pairs]
                assert all(a == b for a, b in pairs if a[0] not in CHANGED)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_rescoring_with_the_same_reward_writes_the_same_lines(tmp_path: Path, form: str) -> None:
    source = made(tmp_path, f"output.format={form}", f"reward._target_={HERE}.seen")
    assert rescore(source, tmp_path / "new") == Exit.ERROR_ROWS
    assert records_of(tmp_path / "new") == records_of(source)
    if form == "jsonl":
        for path in (source / "shards").glob("*.jsonl"):
            assert (tmp_path / "new" / "shards" / path.name).read_bytes() == path.read_bytes()


def test_a_reward_that_failed_may_succeed_and_the_other_way_round(tmp_path: Path) -> None:
    source = made(tmp_path, f"reward._target_={HERE}.seen")
    assert rescore(source, tmp_path / "failed", target_function="fails_for_three") == Exit.ERROR_ROWS
    failed = [record for record in records_of(tmp_path / "failed") if record["prompt"] == "three"]
    assert [(record["error_class"], record["reward"]) for record in failed] == [("reward_failed", None)] * 2
    assert "no three" in failed[0]["error"]
    assert failed[0]["text"]
    assert rescore(tmp_path / "failed", tmp_path / "again") == Exit.ERROR_ROWS
    assert records_of(tmp_path / "again") == records_of(source)


def failed_at(record: dict[str, Any]) -> tuple[str, str, bool]:
    return record["error_class"], record["error"], record["reward"] is None


@pytest.mark.parametrize("first", ["seen", "fails_for_three"])
def test_what_the_reference_model_failed_at_stays(tmp_path: Path, first: str) -> None:
    """Whether the reward of the same record fails before, after, or never."""
    made(tmp_path / "ids")
    failing = next(record["row_id"] for record in records_of(tmp_path / "ids" / "out") if record["prompt"] == "three")
    reference = Reference(failing)

    def job(folder: Path, function: str) -> Path:
        own = (f"model.reference={fake_model(folder / 'reference', '{}')}", f"reward._target_={HERE}.{function}")
        return made(folder, *own, reference=reference)

    source = job(tmp_path / "source", first)
    for function in ("seen", "fails_for_three"):
        rescore(source, tmp_path / function, target_function=function)
        found, expected = records_of(tmp_path / function), records_of(job(tmp_path / f"job-{function}", function))
        assert list(map(failed_at, found)) == list(map(failed_at, expected))
        assert any("It is too long." in record["error"] for record in found)


def test_one_row(tmp_path: Path) -> None:
    source = made(tmp_path, "data.limit=1", "sampling.n=1")
    assert rescore(source, tmp_path / "new", "+reward.scale=2") == Exit.COMPLETE
    (record,) = records_of(tmp_path / "new")
    assert record["reward"] == pytest.approx(2 * len(record["text"]) + 1)


def test_a_killed_rescoring_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed and stopped among 3,000 samples, then shared; shards that are there are not scored again."""
    source, target = tmp_path / "out", tmp_path / "new"
    config = config_of(tmp_path, "data.limit=750", "sampling.n=4", "output.rows_per_shard=25", "output.format=jsonl")
    assert run_job(config, load_fake()) == Exit.COMPLETE
    function = f"reward._target_={HERE}.slow"
    command = [sys.executable, "-m", "rollout.rescore", str(source), function, f"output.dir={target}"]
    for number, shards, status in ((signal.SIGKILL, 3, -9), (signal.SIGTERM, 6, Exit.RESUMABLE)):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            while len(list(target.glob("shards/*.json"))) < shards:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
        assert process.returncode == status
    there = {path: path.stat().st_mtime_ns for path in target.glob("shards/*.json")}
    assert len(there) < 30
    assert not verify(target).complete
    with subprocess.Popen(command, stderr=subprocess.PIPE) as other:  # two share what is left
        assert rescore(source, target, target_function="slow") == Exit.COMPLETE
    assert other.returncode == Exit.COMPLETE
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert verify(target).complete
    records = records_of(target)
    assert [record["reward"] for record in records] == [len(record["text"]) for record in records]
    assert len(records) == 3000
    assert without_rewards(records) == without_rewards(records_of(source))
    assert not (target / "work").exists()


def test_an_interrupted_rescoring_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = made(tmp_path)
    calls = itertools.count()

    def interrupted(*args: Any, **options: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        write(*args, **options)

    write = module.rewrite
    monkeypatch.setattr(module, "rewrite", interrupted)
    assert rescore(source, tmp_path / "new") == Exit.RESUMABLE
    assert f"the same command resumes the run in {tmp_path / 'new'}." in capsys.readouterr().err
    assert len(list((tmp_path / "new" / "shards").glob("*.json"))) == 1
    assert rescore(source, tmp_path / "new") == Exit.ERROR_ROWS
    assert verify(tmp_path / "new").complete


def test_a_full_disk_is_a_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = made(tmp_path)

    shard = str(tmp_path / "new" / "shards" / "00000.parquet")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", shard)

    with monkeypatch.context() as patched:
        patched.setattr(module, "commit_file", full)
        assert rescore(source, tmp_path / "new") == Exit.RESUMABLE
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"No space is left for {shard}: free some, and the same command resumes the run."
    assert rescore(source, tmp_path / "new") == Exit.ERROR_ROWS
    assert verify(tmp_path / "new").complete


def test_a_damaged_shard_of_the_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made(tmp_path)
    path = source / "shards" / "00001.parquet"
    whole = path.read_bytes()
    for damage in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], None):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        assert rescore(source, tmp_path / "new") == 2
        said = capsys.readouterr().err
        assert f"Shard 1 of {source} is damaged (" in said
        assert "run the command of that run again, which generates the shard anew, and then this one." in said
    path.write_bytes(whole)
    assert rescore(source, tmp_path / "new") == Exit.ERROR_ROWS
    assert verify(tmp_path / "new").complete


def test_a_run_that_is_not_complete_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError):
        run_job(config_of(tmp_path), load_fake(FakeEngine(fail_after=3)))
    assert rescore(tmp_path / "out", tmp_path / "new") == 2
    assert "is not complete: finish it with its own command first" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_rows_are_read_again_and_must_be_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns that were not kept are read as well; a dataset may have moved, but not have changed."""
    source = made(tmp_path, "data.keep_columns=[]")
    rows, moved = tmp_path / "rows.jsonl", tmp_path / "moved.jsonl"
    rows.rename(moved)
    assert rescore(source, tmp_path / "new") == 2
    assert "name the place with data.path=PATH" in capsys.readouterr().err
    SEEN.clear()
    assert rescore(source, tmp_path / "new", f"data.path={moved}") == Exit.ERROR_ROWS
    assert SEEN[0][0]["answer"] == 1
    assert json.loads((tmp_path / "new" / "run.json").read_text())["config"]["data"]["path"] == str(moved)
    rows.write_text(moved.read_text().replace("three", "other"))
    assert rescore(source, tmp_path / "other") == 2
    assert f"data.path={rows} no longer holds the rows of {source} (data.content was" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_kept_column_that_has_changed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"answer": 1,', '"answer": 7,'))
    assert rescore(source, tmp_path / "new") == 2
    assert "(data.kept_content was" in capsys.readouterr().err


def test_the_new_run_says_where_it_came_from(tmp_path: Path) -> None:
    source = made(tmp_path)
    rescore(source, tmp_path / "new", "+reward.scale=3")
    before, after = (json.loads((folder / "run.json").read_text()) for folder in (source, tmp_path / "new"))
    assert after["fingerprint"]["rescored_from"] == before["digest"] != after["digest"]
    assert after["fingerprint"]["reward"] == {"_target_": f"{HERE}.seen", "scale": 3}
    assert f"reward.source.{HERE}" in after["fingerprint"]
    assert after["config"]["reward"]["scale"] == 3
    assert after["columns"] == before["columns"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{out}", "output.dir={new}"], "No reward is named: write python -m rollout.rescore DIR"),
        (["{out}", "reward=none", "output.dir={new}"], "No reward is named"),
        (["reward=exact_match", "output.dir={new}"], "The command names no run: write"),
        (["{out}", "{new}", "reward=exact_match", "output.dir={new}"], "The command names several runs"),
        (["{out}", "reward=exact_match"], "output.dir must be given"),
        (["{out}", "reward=exact_match", "output.dir={new}", "seed=1"], "seed changes nothing here"),
        (["{out}", "reward=exact_match", "output.dir={out}"], "which stays as it is: choose another folder."),
        (["{out}", "reward=exact_match", "output.dir={out}/new"], "which stays as it is: choose another folder."),
        (["{out}", "reward._target_=no.such", "output.dir={new}"], "reward._target_=no.such cannot be used"),
        (["{out}", "reward._target_=a/b.py:f", "output.dir={new}"], "write reward._target_=a.b.f"),
        (["{new}", "reward=exact_match", "output.dir={new}"], "holds no run"),
        (["-m", "{out}", "reward=exact_match", "output.dir={new}"], "Rescoring has no such option"),
        (["{out}", "reward=exact_match", "output.dir={job}"], "holds a run with another fingerprint"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(
    complete: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"out": complete / "out", "new": complete / "new", "job": complete / "job" / "out"}
    assert main([word.format(**names) for word in words]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
    assert not names["new"].exists()


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two complete runs."""
    folder = tmp_path_factory.mktemp("complete")
    made(folder)
    made(folder / "job", "seed=1")
    return folder


def test_help_names_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "reward._batch_=64" in capsys.readouterr().out
