"""``python -m rollout.score``: every row of a run or a file once, with the model's own numbers, resumable."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM

from rollout.engine.engine import Engine
from rollout.errors import Exit
from rollout.job.job import run_job
from rollout.score import main
from tests.support.jobs import config_of, read_records
from tests.support.saved_models import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in ``out``, three shards with an error row, and a model in ``model``."""
    folder = tmp_path_factory.mktemp("scored")
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "one two three"}\n{"prompt": ""}\n{"prompt": "three"}\n')
    config = config_of(
        folder,
        f"data.path={rows}",
        *("model.dtype=float32", "sampling.n=2", "sampling.temperature=0.7", "sampling.max_new_tokens=9"),
        "output.rows_per_shard=1",
    )
    save_tiny(folder / "model")
    assert run_job(config) == Exit.ERROR_ROWS
    return folder


def run(folder: Path, source: Path, *options: str, output: str = "scores") -> int:
    arguments = [str(source), "--model", str(folder / "model"), "--dtype", "float32"]
    return main([*arguments, "--output", str(folder / output), *options])


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_a_run_gets_the_numbers_of_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    assert run(folder, folder / "out") == Exit.ERROR_ROWS
    assert "rows:       6, 2 with an error" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()} == shards
    records, scored = read_records(folder / "out"), rows_of(folder / "scores")
    for record, row in zip(records, scored, strict=True):
        found, error = row.pop("ref_logprobs"), row.pop("ref_logprobs_error")
        assert row == record
        if record["error_class"]:
            assert found is None
            assert error == record["error"]
        else:
            assert found == pytest.approx(record["logprobs"], abs=1e-5)  # the same model, at the run's temperature
            assert error == ""


def test_the_same_command_scores_only_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, folder / "out", output="resumed")
    before = rows_of(folder / "resumed")
    (folder / "resumed" / "00002.parquet").unlink()
    calls: list[int] = []
    score = Engine.score

    def counted(self: Engine, prompts: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(prompts))
        return score(self, prompts, *args, **options)

    monkeypatch.setattr(Engine, "score", counted)
    run(folder, folder / "out", output="resumed")
    assert calls == [2]
    assert rows_of(folder / "resumed") == before


def test_a_folder_of_other_scores_is_refused_before_the_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(folder, folder / "out", "--dtype", "float99", output="mine") == Exit.BAD_INPUT
    assert run(folder, folder / "out", output="mine") == Exit.ERROR_ROWS
    monkeypatch.setattr("rollout.score.load", lambda _: pytest.fail("the model is loaded"))
    assert run(folder, folder / "out", "--temperature", "2", output="mine") == Exit.BAD_INPUT


def test_a_file_of_texts_and_ids(folder: Path) -> None:
    path = folder / "pairs.jsonl"
    rows = [("one two", "three"), ("one", "two three one"), ("three", "")]
    path.write_text("".join(json.dumps({"q": prompt, "a": answer, "n": 1}) + "\n" for prompt, answer in rows))
    columns = ("--prompt-column", "q", "--completion-column", "a", "--column", "own")
    assert run(folder, path, *columns, output="file") == Exit.COMPLETE
    words = {"one": 1, "two": 2, "three": 3}
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    for (prompt, answer), row in zip(rows, rows_of(folder / "file"), strict=True):
        ids = torch.tensor([[words[word] for word in f"{prompt} {answer}".split()]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(prompt.split())
        expected = [float(logprobs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])]
        assert row == {"q": prompt, "a": answer, "n": 1, "own": pytest.approx(expected, abs=1e-5), "own_error": ""}


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("out", ["--temperature", "2", "--output", "{scores}"], "holds the scores of another model or source"),
        ("out", ["--output", "{out}"], "--output lies in the source, which is never changed"),
        ("out", ["--output", "{model}"], "has files, but no score.json"),
        ("out", ["--column", "text", "--output", "{new}"], "The rows have a column 'text' already"),
        ("out", ["--temperature", "-1", "--output", "{new}"], "--temperature is -1.0, but must be"),
        ("rows.jsonl", ["--output", "{new}"], "has no column 'completion', but prompt: give --completion-column."),
        ("absent", ["--output", "{new}"], "absent does not exist: give the output.dir of a run, or a file."),
        ("rows.jsonl", ["--prompt-column", "text", "--output", "{new}"], "--prompt-column text is not a column of"),
        ("out", ["--output", "{out}/scores"], "--output lies in the source, which is never changed"),
        ("out", ["--output", "{new}", "--model", "no/such"], "--model 'no/such' is no folder or file here"),
        ("out", ["--output", "{new}", "--dtype", "float99"], "--dtype is 'float99', but must be one of"),
        ("model", ["--output", "{new}"], "holds no run"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    folder: Path, source: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, folder / "out")
    capsys.readouterr()
    named = {name: folder / name for name in ("scores", "out", "model")} | {"new": folder / f"new-{len(message)}"}
    arguments = [option.format(**named) for option in options]
    assert main([str(folder / source), "--model", str(folder / "model"), "--dtype", "float32", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not named["new"].exists()  # nothing is left that would stand in the way of the next attempt


def test_an_incomplete_run_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = folder / "out" / "shards" / "00001.json"
    kept = manifest.read_text()
    manifest.unlink()
    assert run(folder, folder / "out", output="never") == 2
    manifest.write_text(kept)
    assert "holds a run that is not complete: resume it first." in capsys.readouterr().err


def test_files_of_every_form_are_read_as_a_job_reads_them(folder: Path) -> None:
    """CSV, compressed lines and chats with tools; a row without a prompt says so, and columns keep their types."""
    csv = folder / "pairs.csv"
    csv.write_text("id,prompt,completion\n007,one two,three\n008,one,\n009,,two\n")
    assert run(folder, csv, output="csv") == Exit.ERROR_ROWS
    rows = rows_of(folder / "csv")
    assert [row["id"] for row in rows] == ["007", "008", "009"]
    assert [row["ref_logprobs"] and len(row["ref_logprobs"]) for row in rows] == [1, [], None]
    assert rows[2]["ref_logprobs_error"].startswith("The prompt is empty")
    packed = folder / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"prompt": [1, 2], "completion": [3]}\n{"prompt": "one", "completion": 7}\n'))
    assert run(folder, packed, output="gz") == Exit.ERROR_ROWS
    assert [row["ref_logprobs_error"] == "" for row in rows_of(folder / "gz")] == [True, False]


def test_all_files_of_an_output_have_the_same_columns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.score._PIECE_ROWS", 2)
    path = folder / "late.jsonl"
    lines = [{"prompt": "one", "completion": "two", "note": None}] * 2
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {**lines[0], "note": 2.5}]))
    assert run(folder, path, output="late") == Exit.COMPLETE
    written = sorted((folder / "late").glob("*.parquet"))
    assert len(written) == 2
    loaded = load_dataset("parquet", data_files=[str(file) for file in written], split="train")
    assert loaded["note"] == [None, None, 2.5]


def test_an_interrupted_command_says_that_it_resumes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score = Engine.score
    calls: list[int] = []

    def interrupted(self: Engine, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(self, *args, **options)

    monkeypatch.setattr(Engine, "score", interrupted)
    assert run(folder, folder / "out", output="stopped") == Exit.RESUMABLE
    assert "the same command resumes the run in" in capsys.readouterr().err
    assert len(rows_of(folder / "stopped")) == 4
    assert run(folder, folder / "out", output="stopped") == Exit.ERROR_ROWS
    assert len(rows_of(folder / "stopped")) == 6
