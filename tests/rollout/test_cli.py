"""The command line: bad input is refused in one sentence, and jobs run on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import rollout.job.job
from rollout.__main__ import main
from rollout.verify import verify
from tests.support.jobs import fake_model, load_fake, read_records, refuse_to_load
from tests.support.saved_models import save_words_llama

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of random weights with 48 positions, and a tokenizer without a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_words_llama(folder, 48, end="</s>")
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a job runs in, with a fake model and no engine to load."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rollout.job.job, "load_engine", refuse_to_load)
    fake_model(tmp_path / "model")
    return tmp_path


def write_rows(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence on stderr of a job that is refused."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *logged, sentence = captured.err.splitlines()
    # What the job is doing is logged, each line with its time.
    assert all(line[2:6:3] == "::" for line in logged), captured.err
    assert sentence.endswith(".")
    return sentence


def overridden(arguments: Sequence[str], *overrides: str) -> list[str]:
    """The arguments with others in the place of those of the same key: a key is given once."""
    keys = {override.partition("=")[0] for override in overrides}
    return [*(argument for argument in arguments if argument.partition("=")[0] not in keys), *overrides]


BASE = ("model.path=model", "output.dir=out")


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("sampling.temprature=0", "There is no key sampling.temprature; the nearest is sampling.temperature."),
        ("temperature=0", "There is no key temperature; the nearest is sampling.temperature."),
        ("sampler.n=2", "There is no key sampler.n; the nearest is sampling.n."),
        ("batchr=static", "There is no key batchr; the nearest is batcher."),
        ("quantum=1", "There is no key quantum; `python -m rollout --help` lists all keys."),
        ("sede=1", "There is no key sede; the nearest is seed."),
        ("+sampling.best_of=3", "There is no key sampling.best_of: every sample is kept"),
        (
            "batcher=statik",
            "There is no batcher=statik; did you mean static; "
            "batcher is one of memory, paper, predictive, sla, static.",
        ),
        (
            "+experiment=ppo_samplin",
            "There is no experiment=ppo_samplin; did you mean ppo_sampling; "
            "experiment is one of bulk_inference, grpo_sampling, ppo_sampling.",
        ),
        ("experiment=ppo_sampling", "write +experiment=ppo_sampling."),
        ("reward.scale=2", "write +reward.scale=2."),
        ("sampling.n=many", "sampling.n is many, but must be a whole number (samples of each prompt)."),
        ("sampling.n=[1", "sampling.n is '[1', but must be a whole number"),
        ("sampling.n", "sampling.n has no value: write sampling.n=VALUE."),
        ("sampling.temperature=-1", "sampling.temperature is -1.0, but must be a finite number of at least 0"),
        ("sampling.top_p=0", "sampling.top_p is 0.0, but must be above 0 and at most 1"),
        ("sampling.top_p=1.5", "sampling.top_p is 1.5, but must be above 0 and at most 1"),
        ("sampling.max_new_tokens=0", "sampling.max_new_tokens is 0, but must be a whole number of at least 1"),
        ("sampling.n=0", "sampling.n is 0, but must be a whole number of at least 1"),
        ("data.path=no.jsonl", "data.path=no.jsonl does not exist."),
        ("data.path=torn.jsonl", "Line 2 of torn.jsonl is not a complete JSON object"),
        ("data.path=empty.jsonl", "data.path=empty.jsonl holds no input rows."),
        ("data.prompt_column=text", "data.prompt_column=text is not a column of builtin:arithmetic, which has "),
        ("data.id_column=answer", "(counted from 0) have the same id"),
        ("output.dir=file/out", "output.dir=file/out cannot be written (Not a directory): choose another folder."),
        ("output.dir=other", "sampling.n was 3 and is 1"),
        ("model.path=nothing/here", "model.path 'nothing/here' "),
        ("reward._target_=no.such.function", "reward._target_=no.such.function cannot be used: "),
    ],
)
def test_bad_input_is_refused_before_a_model_loads(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argument: str, sentence: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "torn.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b')
    (folder / "empty.jsonl").write_text("")
    (folder / "file").write_text("")
    if argument == "output.dir=other":
        monkeypatch.setattr(rollout.job.job, "load_engine", load_fake())
        assert main(["model.path=model", argument, "data.limit=2", "sampling.n=3"]) == 0
        monkeypatch.setattr(rollout.job.job, "load_engine", refuse_to_load)
        capsys.readouterr()
    assert sentence in refused(capsys, *overridden(BASE, argument))
    assert not (folder / "out" / "run.json").exists()


def test_missing_output_directory_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "model.path=model").startswith("output.dir must be given, e.g. output.dir=")
    sentence = refused(capsys, "model.path=model", "+experiment=bulk_inference")
    assert sentence.startswith("data.path and output.dir must be given")


def test_crash_shows_its_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*arguments: object) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(rollout.job.job, "load_engine", crash)
    assert main([*BASE, "data.limit=2"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2] == "RuntimeError: a bug"
    assert lines[-1].startswith("The job crashed (RuntimeError): what out holds is kept, and the same command resumes")


def test_job_writes_only_to_the_output_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout.job.job, "load_engine", load_fake())
    assert main([*BASE, "data.limit=3", "reward=null"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["model", "out"]


def test_sweep_ends_with_the_worst_status(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout.job.job, "load_engine", load_fake())
    write_rows(folder / "bad.jsonl", {"prompt": ""})
    write_rows(folder / "good.jsonl", {"prompt": "a"})
    sweep = ["-m", "model.path=model", "hydra.sweep.dir=sweep"]
    assert main([*sweep, "output.dir=a", "data.path=good.jsonl"]) == 0
    assert main([*sweep, "output.dir='b_${data.path}'", "data.path=good.jsonl,bad.jsonl"]) == 4
    assert verify(folder / "b_good.jsonl").complete
    assert verify(folder / "b_bad.jsonl").complete


# On a tiny real model


def job(tiny: Path, *overrides: str) -> list[str]:
    common = ["data.path=rows.jsonl", "sampling.max_new_tokens=6", "sampling.n=2", "output.dir=out"]
    return overridden([f"model.path={tiny}", "model.device=cpu", *common], *overrides)


def test_chat_messages_need_a_template(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rollout.models.loading.load.load_model", refuse_to_load)
    write_rows(tmp_path / "rows.jsonl", {"prompt": [{"role": "user", "content": "w1"}]})
    assert "has no chat template" in refused(capsys, *job(tiny))
    write_rows(tmp_path / "rows.jsonl", {"prompt": "w1"})
    assert "has no chat template" in refused(capsys, *job(tiny, "data.as_chat=true"))


def test_unsupported_model_is_refused(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", {"prompt": "w1"})
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (model / "config.json").write_text(json.dumps(config))
    assert "causal language model" in refused(capsys, *job(model))
    assert not (tmp_path / "out" / "run.json").exists()


def test_bad_prompts_become_error_records(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prompts = ["w1 w2 w3", "", " ", "w1 " * 60, [1, 2, 3], [99]]
    write_rows(tmp_path / "rows.jsonl", *({"prompt": prompt} for prompt in prompts))
    assert main(job(tiny)) == 4
    records = read_records(tmp_path / "out")
    classes = ["", "empty_prompt", "empty_prompt", "prompt_too_long", "", "bad_prompt"]
    assert [record["error_class"] for record in records] == [name for name in classes for _ in range(2)]
    assert all(record["error"] for record in records if record["error_class"])
    assert verify(tmp_path / "out").complete


def test_sample_too_large_for_memory_is_an_error(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", {"prompt": "w1"})
    assert main(job(tiny, "memory.max_kv_bytes=1")) == 4
    assert {record["error_class"] for record in read_records(tmp_path / "out")} == {"too_large"}


def test_execution_settings_do_not_change_results(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", *({"prompt": f"w{i} w{i + 1}"} for i in range(1, 8)))
    variants = {
        "one": ["batcher.max_rows=1"],
        "many": ["output.rows_per_shard=3"],
        "static": ["batcher=static", "batcher.max_rows=5", "output.rows_per_shard=2"],
    }
    for name, overrides in variants.items():
        assert main(job(tiny, *overrides, f"output.dir={name}", "model.dtype=float32")) == 0
    exact = ("row_id", "sample", "completion_ids", "text", "finish_reason")
    results = [[{key: r[key] for key in exact} for r in read_records(tmp_path / name)] for name in variants]
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 14


def test_job_in_a_process_of_its_own(tiny: Path, tmp_path: Path) -> None:
    """A process of its own, in a folder with packages of the same names as those of this project."""
    for name in ("conf", "models", "batcher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('the wrong package')")
    (tmp_path / "conf" / "config.yaml").write_text("seed: 99\n")
    (tmp_path / "my_reward.py").write_text("def score(row, text):\n    return float(len(text) + row['bonus'])\n")
    write_rows(tmp_path / "rows.jsonl", *({"prompt": f"w{i}", "bonus": i} for i in range(1, 6)))
    arguments = job(tiny, "reward._target_=my_reward.score", "output.format=jsonl")

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True, timeout=180
        )

    done = run("rollout", *arguments)
    assert done.returncode == 0, done.stderr
    assert "prompts:     5, 10 samples (2 each)" in done.stdout
    assert "mean reward:" in done.stdout
    assert "Traceback" not in done.stderr
    verified = run("rollout.verify", "out")
    assert (verified.returncode, verified.stdout) == (0, "complete: 10 of 10 samples\n")
    records = read_records(tmp_path / "out")
    assert all(record["reward"] == len(record["text"]) + 1 + at // 2 for at, record in enumerate(records))
    assert {record["seed"] for record in records} == {0}
    mistyped = run("rollout", *arguments, "sampling.temprature=0")
    assert mistyped.returncode == 2
    assert mistyped.stderr == "There is no key sampling.temprature; the nearest is sampling.temperature.\n"
