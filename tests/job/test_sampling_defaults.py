"""What a model recommends: applied or named, and never in place of what is given."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rollout.config.compose import given_parameters, load_config
from rollout.config.schema import SamplingConfig
from rollout.errors import Exit, InputError
from rollout.job.job import run_job
from rollout.job.sampling_defaults import with_model_defaults
from rollout.sampling_params import SamplingParams
from tests.support.jobs import JOB, FakeEngine, config_of, load_fake

RECOMMENDED = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05, "eos_token_id": 2}


def model_with(folder: Path, **fields: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def sampling_of(*overrides: str) -> SamplingConfig:
    return load_config(["output.dir=x", *overrides]).sampling


def test_recommended_values_are_applied_where_none_is_given(tmp_path: Path) -> None:
    model = model_with(tmp_path, **RECOMMENDED)
    applied = with_model_defaults(sampling_of("sampling.defaults=model", "sampling.top_p=0.5"), model)
    assert applied.params() == SamplingParams(temperature=0.6, top_p=0.5, repetition_penalty=1.05)


def test_value_on_the_command_line_wins_even_if_it_is_the_default(tmp_path: Path) -> None:
    model = model_with(tmp_path, **RECOMMENDED)
    for prefix in ("", "+", "++"):
        given = given_parameters(["output.dir=x", f"{prefix}sampling.temperature=1.0", "data.limit=2"])
        applied = with_model_defaults(sampling_of("sampling.defaults=model"), model, given)
        assert applied.params() == SamplingParams(top_p=0.95, repetition_penalty=1.05)


def test_recommendations_that_are_not_applied_are_named_with_their_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sampling = sampling_of("sampling.top_p=0.9")
    assert with_model_defaults(sampling, model_with(tmp_path, **RECOMMENDED)) == sampling
    [line] = caplog.messages
    assert "recommends temperature 0.6, repetition_penalty 1.05; sampling.defaults=model" in line


def test_recommendation_that_an_option_overrules_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = model_with(tmp_path, do_sample=True, temperature=0.6)
    applied = with_model_defaults(sampling_of("sampling.defaults=model", "sampling=greedy"), model)
    assert applied.temperature == 0
    assert "this job sets them: temperature 0.6." in caplog.text


@pytest.mark.parametrize("fields", [{}, {"eos_token_id": 2, "temperature": 1.0, "top_k": 0}])
def test_model_that_recommends_nothing_changes_nothing(
    tmp_path: Path, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert with_model_defaults(sampling_of(), model_with(tmp_path, **fields)).params() == SamplingParams()
    assert with_model_defaults(sampling_of(), tmp_path / "model.gguf").params() == SamplingParams()
    assert not caplog.messages


def test_config_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"generation_config\.json cannot be used: temperature is -1"):
        with_model_defaults(sampling_of("sampling.defaults=model"), model_with(tmp_path, temperature=-1))
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(InputError, match="no JSON object"):
        with_model_defaults(sampling_of(), tmp_path)
    with pytest.raises(InputError, match=r"sampling\.defaults is 'some', but must be none or model"):
        sampling_of("sampling.defaults=some")


def test_job_runs_with_resolved_values_and_resumes_only_with_them(tmp_path: Path) -> None:
    config = config_of(tmp_path, *JOB, "sampling.defaults=model")
    model_with(tmp_path / "model", **RECOMMENDED)
    with pytest.raises(RuntimeError, match="fails here"):
        run_job(config, load_fake(FakeEngine(fail_after=5)))
    with pytest.raises(InputError, match=r"sampling\.temperature was 0\.6 and is 1\.0"):
        run_job(config, load_fake(), given={"temperature"})
    engine = FakeEngine()
    explicit = config_of(
        tmp_path, *JOB, "sampling.temperature=0.6", "sampling.top_p=0.95", "sampling.repetition_penalty=1.05"
    )
    assert run_job(explicit, load_fake(engine)) == Exit.COMPLETE
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["config"]["sampling"]["temperature"] == 0.6
