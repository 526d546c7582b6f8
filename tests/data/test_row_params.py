"""Sampling parameters from the columns of an input row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rollout.config.compose import load_config
from rollout.data.prompts import read_prompts
from rollout.data.row_params import RowParams
from rollout.errors import InputError, PromptError
from rollout.sampling_params import SamplingParams

JOB = SamplingParams(max_new_tokens=9, temperature=0.5)


@pytest.mark.parametrize(
    ("parameter", "value", "expected"),
    [
        ("max_new_tokens", 3, 3),
        ("max_new_tokens", 3.0, 3),
        ("max_new_tokens", "3", 3),
        ("max_new_tokens", None, 9),
        ("max_new_tokens", "", 9),
        ("temperature", "0.25", 0.25),
        ("temperature", 0, 0.0),
        ("ignore_eos", "True", True),
        ("stop", "a", ("a",)),
        ("stop", "12", ("12",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", '["a", "b"]', ("a", "b")),
        ("stop", "[", ("[",)),
        ("stop_token_ids", "[1, 2]", (1, 2)),
        ("allowed_token_ids", [4, 5], (4, 5)),
        ("bad_words", ["x", "y z"], ("x", "y z")),
        ("logit_bias", {"5": 1.5, "6": None}, ((5, 1.5),)),
        ("logit_bias", '{"5": 1.5}', ((5, 1.5),)),
        ("logit_bias", [(5, 1.5)], ((5, 1.5),)),
    ],
)
def test_column_value_takes_the_place_of_the_jobs(parameter: str, value: Any, expected: Any) -> None:
    params = RowParams(JOB, {parameter: "c"}).of({"c": value, "other": 1})
    assert getattr(params, parameter) == expected
    assert params.temperature == (expected if parameter == "temperature" else 0.5)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("max_new_tokens", "many"),
        ("max_new_tokens", 0),
        ("temperature", True),
        ("temperature", "nan"),
        ("stop", [""]),
        ("stop", 5),
        ("logit_bias", {"a": 1.0}),
        ("ignore_eos", "yes"),
    ],
)
def test_bad_value_names_its_column(parameter: str, value: Any) -> None:
    with pytest.raises(PromptError, match=rf"data\.sampling_columns, column c: {parameter} is ") as error:
        RowParams(JOB, {parameter: "c"}).of({"c": value})
    assert error.value.error_class == "bad_params"


def test_values_that_do_not_suit_the_model_name_their_column() -> None:
    def check(params: SamplingParams) -> None:
        raise InputError("logit_bias has the token id 5, but the last one is 4.")

    row_params = RowParams(JOB, {"logit_bias": "b", "temperature": "t"}, check)
    with pytest.raises(PromptError, match="column b: logit_bias has the token id 5"):
        row_params.of({"b": {"5": 1.0}, "t": 1.0})
    assert row_params.of({"b": None, "t": None}) is JOB


def test_values_of_the_columns_enter_the_digest_of_the_data(tmp_path: Path) -> None:
    def content(limit: int | None, *overrides: str) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"prompt": "a", "limit": limit, "other": 3}))
        config = load_config(["output.dir=x", "data=dataset", f"data.path={path}", *overrides])
        return read_prompts(config.data).content

    columns = "data.sampling_columns={max_new_tokens: limit}"
    assert content(3, columns) != content(4, columns)
    assert content(3, columns) == content(3, columns)
    assert content(3) == content(4)
    assert content(3, columns) != content(3, "data.sampling_columns={top_k: limit}")


@pytest.mark.parametrize("given", ["{n: limit}", "{max_tokens: limit}", "{temperature: 3}", "limit"])
def test_other_names_and_n_are_refused(given: str) -> None:
    with pytest.raises(InputError, match=r"^data\.sampling_columns is .*n is the same for all rows"):
        load_config(["output.dir=x", f"data.sampling_columns={given}"])
