"""Jobs with a reference model: its log-probabilities stand in every record, despite failures and interruptions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rollout.errors import Exit, InputError
from rollout.job.job import run_job
from rollout.records import Record
from rollout.run_dir.paths import RunPaths
from rollout.scores import Score, Scores, ScoringStats
from rollout.verify import verify
from tests.support.jobs import (
    EXPECTED,
    JOB,
    FakeEngine,
    config_of,
    fake_model,
    keys,
    load_fake,
    read_part_records,
    read_records,
    refuse_to_load,
    without_attempt,
)
from tests.support.saved_models import save_tiny


class FakeReference:
    """Scores each token by its id, and fails for one row."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.temperatures: set[float] = set()
        self.calls: list[int] = []

    def score(self, records: Sequence[Record], *, temperature: Sequence[float]) -> Scores:
        self.calls.append(len(records))
        self.temperatures.update(temperature)
        scores = [
            Score(error_class="too_long", error="It is too long.")
            if record.row_id == self.failing
            else Score([-float(token % 7) for token in record.completion_ids])
            for record in records
        ]
        return Scores(tuple(scores), ScoringStats(*[0] * 9, seconds=0.0))


def config_with_reference(folder: Path, *overrides: str) -> Any:
    return config_of(folder, *JOB, f"model.reference={fake_model(folder / 'reference', '{}')}", *overrides)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_every_record_has_the_numbers_of_the_reference(
    tmp_path: Path, form: str, uninterrupted: list[dict[str, Any]]
) -> None:
    reference = FakeReference()
    config = config_with_reference(tmp_path, f"output.format={form}", "sampling.temperature=0.5")
    assert run_job(config, load_fake(reference=reference)) == Exit.COMPLETE
    records = read_records(tmp_path / "out")
    assert keys(records) == EXPECTED
    for record, plain in zip(records, uninterrupted, strict=True):
        assert record.pop("ref_logprobs") == [-float(token % 7) for token in record["completion_ids"]]
        assert record.keys() == plain.keys()
    assert verify(tmp_path / "out").complete
    assert sum(reference.calls) == 60
    assert reference.temperatures == {0.5}


def test_an_interrupted_job_resumes_with_the_same_records(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_job(config_with_reference(whole), load_fake(reference=FakeReference()))
    with pytest.raises(RuntimeError, match="the engine fails here"):
        run_job(config_with_reference(cut), load_fake(FakeEngine(fail_after=9), FakeReference()))
    stored = read_part_records(cut / "out")
    assert len(stored) == 9  # those that waited for their batch were scored when the job ended
    assert all(len(record.ref_logprobs) == len(record.completion_ids) for record in stored)
    engine = FakeEngine()
    assert run_job(config_with_reference(cut), load_fake(engine, FakeReference())) == Exit.COMPLETE
    assert len(engine.asked) == 60 - 9
    assert without_attempt(read_records(cut / "out")) == without_attempt(read_records(whole / "out"))


class StoppedReference(FakeReference):
    """Is interrupted in its first call, as by Ctrl-C, or fails in every one."""

    def __init__(self, error: type[BaseException], times: int) -> None:
        super().__init__()
        self.error = error
        self.times = times

    def score(self, records: Sequence[Record], *, temperature: Sequence[float]) -> Scores:
        if self.times:
            self.times -= 1
            raise self.error
        return super().score(records, temperature=temperature)


def test_a_stop_while_the_reference_scores_loses_nothing(tmp_path: Path) -> None:
    config = config_with_reference(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_job(config, load_fake(reference=StoppedReference(KeyboardInterrupt, 1)))
    assert run_job(config, refuse_to_load) == Exit.COMPLETE
    records = read_records(tmp_path / "out")
    assert keys(records) == EXPECTED
    assert all(record["ref_logprobs"] for record in records)


def test_a_reference_that_crashes_leaves_its_shards_to_others(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_job(config_with_reference(tmp_path), load_fake(reference=StoppedReference(RuntimeError, 99)))
    assert list(RunPaths(tmp_path / "out").claims.iterdir()) == []


def test_what_the_reference_cannot_score_keeps_its_completion(
    tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    reference = FakeReference(failing="arithmetic-00003")
    assert run_job(config_with_reference(tmp_path), load_fake(reference=reference)) == Exit.ERROR_ROWS
    records = read_records(tmp_path / "out")
    failed = [record for record in records if record["error_class"]]
    assert keys(failed) == EXPECTED[9:12]
    assert {(r["error_class"], r["error"], *r["ref_logprobs"]) for r in failed} == {
        ("reference_failed", "It is too long.")
    }
    assert [r["completion_ids"] for r in records] == [r["completion_ids"] for r in uninterrupted]
    assert verify(tmp_path / "out").complete


def test_another_reference_is_another_run(tmp_path: Path) -> None:
    run_job(config_with_reference(tmp_path), load_fake(reference=FakeReference()))
    with pytest.raises(InputError, match=r"model\.reference was"):
        run_job(config_of(tmp_path, *JOB), refuse_to_load)
    (tmp_path / "reference" / "config.json").write_text('{"other": 1}')
    config = config_of(tmp_path, *JOB, f"model.reference={tmp_path / 'reference'}")
    with pytest.raises(InputError, match=r"model\.reference was"):
        run_job(config, refuse_to_load)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.reference=no/such/model"], r"^model\.reference 'no/such/model' does not exist"),
        (["model.reference=x", "model.tensor_parallel=true"], r"^model\.reference is 'x', but must be null where"),
        (["model.reference=x", "model.device_map=auto"], r"^model\.reference is 'x', but must be null where"),
    ],
)
def test_a_reference_that_cannot_be_used_is_refused_at_the_start(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_job(config_of(tmp_path, *JOB, *overrides), refuse_to_load)


def real_job(folder: Path, reference: Path) -> Any:
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "one two three"}\n{"prompt": "three"}\n')
    return config_of(
        folder,
        f"data.path={rows}",
        f"model.reference={reference}",
        "model.dtype=float32",
        "sampling.n=3",
        "sampling.temperature=0.7",
        "sampling.max_new_tokens=9",
    )


def test_real_models(tmp_path: Path) -> None:
    config = real_job(tmp_path, tmp_path / "reference")
    save_tiny(tmp_path / "model")
    save_tiny(tmp_path / "reference")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "reference", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "reference")
    assert run_job(config) == Exit.COMPLETE
    records = read_records(tmp_path / "out")
    assert len(records) == 6
    for record in records:
        ids = torch.tensor([record["prompt_ids"] + record["completion_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(record["prompt_ids"]) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, ids[0, len(record["prompt_ids"]) :, None])[:, 0]
        assert record["ref_logprobs"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert record["ref_logprobs"] != pytest.approx(record["logprobs"], abs=1e-3)


def test_a_reference_with_other_tokens_is_refused(tmp_path: Path) -> None:
    config = real_job(tmp_path, tmp_path / "reference")
    save_tiny(tmp_path / "model")
    save_tiny(tmp_path / "reference")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "reference")
    words = tokenizer.backend_tokenizer.to_str().replace('"two":2', '"deux":2')
    (tmp_path / "reference" / "tokenizer.json").write_text(words)
    with pytest.raises(InputError, match=r"^model\.reference=.*another vocabulary.*: id 2 is 'deux' and not 'two'"):
        run_job(config)
