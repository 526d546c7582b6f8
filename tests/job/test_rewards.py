"""Rewards: loaded by name; a failure concerns one record only."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from rollout.arithmetic import exact_match
from rollout.errors import InputError
from rollout.job.rewards import Reward, Scorer, load_reward
from rollout.records import Record
from rollout.requests import Request
from rollout.sampling_params import SamplingParams
from tests.support.jobs import record_of

HERE = "tests.job.test_rewards"
RECORD = record_of(Request("row", [1], SamplingParams()), 0)


def length(prompt_row: dict[str, Any], completion_text: str, scale: float = 1.0) -> float:
    return scale * len(completion_text)


def failing(prompt_row: dict[str, Any], completion_text: str) -> float:
    raise KeyError("answer")


def takes_one(prompt_row: dict[str, Any]) -> float:
    return 0.0


class Offset:
    def __init__(self, offset: float) -> None:
        self.offset = offset

    def __call__(self, prompt_row: dict[str, Any], completion_text: str) -> float:
        return self.offset + prompt_row["base"]


NOT_CALLABLE = 3


def test_reward_is_a_function_or_an_instance_of_a_class() -> None:
    assert load_reward(None) is None
    function = load_reward({"_target_": "rollout.arithmetic.exact_match"})
    assert function is not None
    assert function.function({"answer": "3"}, "3") == exact_match({"answer": "3"}, "3") == 1.0
    assert type(function.function) is functools.partial  # Hydra's own kind takes 0.1 ms a call
    scaled = load_reward({"_target_": f"{HERE}.length", "scale": 0.5})
    assert scaled is not None
    assert scaled.function({}, "four") == 2.0
    instance = load_reward({"_target_": f"{HERE}.Offset", "offset": 1.0})
    assert instance is not None
    assert instance.function({"base": 2.0}, "") == 3.0


@pytest.mark.parametrize(
    "config",
    [
        {"_target_": "no.such.module.score"},
        {"_target_": f"{HERE}.nothing"},
        {"_target_": f"{HERE}.NOT_CALLABLE"},
        {"_target_": f"{HERE}.takes_one"},
        {"_target_": f"{HERE}.length", "no_such_argument": 1},
        {"_target_": f"{HERE}.Offset"},
        {"_target_": "not a name"},
        {"_target_": ""},
    ],
)
def test_invalid_reward_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"^reward\._target_={config['_target_']} "):
        load_reward(config)


def score(record: Record, columns: dict[str, Any], function: Any) -> Record:
    (scored,) = Scorer(None if function is None else Reward(function)).add(record, columns)
    return scored


def test_score_adds_the_reward() -> None:
    assert score(RECORD, {}, length).reward == len(RECORD.text)
    assert score(RECORD, {}, None) is RECORD


def test_reward_that_raises_keeps_the_completion() -> None:
    result = score(RECORD, {}, failing)
    assert (result.error_class, result.error) == ("reward_failed", "KeyError: 'answer'")
    assert result.reward is None
    assert (result.completion_ids, result.finish_reason) == (RECORD.completion_ids, RECORD.finish_reason)


def test_reward_that_exits_keeps_the_job() -> None:
    assert score(RECORD, {}, lambda row, text: sys.exit(3)).error == "SystemExit: 3"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e39, 10**400, None, "many", [1.0, 2.0], {}])
def test_reward_that_is_no_finite_number_is_an_error(value: Any) -> None:
    result = score(RECORD, {}, lambda row, text: value)
    assert (result.error_class, result.reward) == ("reward_failed", None)


@pytest.mark.parametrize(
    "value", [1, True, np.float32(1), np.array([1]), torch.ones(1, requires_grad=True), Fraction(1)]
)
def test_reward_of_any_numeric_type_is_a_float(value: Any) -> None:
    result = score(RECORD, {}, lambda row, text: value)
    assert type(result.reward) is float
    assert result.reward == 1.0


def test_error_records_are_not_scored() -> None:
    error = replace(RECORD, finish_reason="error", error_class="too_large")
    assert score(error, {}, failing) is error


def test_first_failure_is_said_at_once_and_all_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    scorer = Scorer(Reward(failing))
    for _ in range(3):
        scorer.add(RECORD, {})
    assert scorer.failed == 3
    assert [record.getMessage() for record in caplog.records] == [
        "The reward of row row, sample 0 failed (KeyError: 'answer'); its completion is kept. Further failures "
        "are counted."
    ]


@pytest.mark.parametrize(
    ("batch", "remedy"), [(None, "use reward._batch_=64 and"), (2, "use a larger reward._batch_.")]
)
def test_slow_reward_is_said_once_with_its_remedy(
    caplog: pytest.LogCaptureFixture, batch: int | None, remedy: str
) -> None:
    now = 0.0

    def slow(rows: object, texts: object) -> Any:
        nonlocal now
        now += 1.0
        return 1.0 if batch is None else [1.0] * batch

    scorer = Scorer(Reward(slow, batch), clock=lambda: now)
    for _ in range(60):
        now += 0.5
        scorer.add(RECORD, {})
    (record,) = caplog.records
    assert remedy in record.getMessage()


def test_reward_that_takes_little_of_the_time_is_not_said_to_be_slow(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0

    def quick(row: object, text: str) -> float:
        nonlocal now
        now += 1.0
        return 1.0

    scorer = Scorer(Reward(quick), clock=lambda: now)
    for _ in range(60):
        now += 9.0
        scorer.add(RECORD, {})
    assert not caplog.records


def test_reason_of_several_lines_is_said_in_one(caplog: pytest.LogCaptureFixture) -> None:
    def failing_at_length(row: dict[str, Any], text: str) -> float:
        raise ValueError("no answer:\n  nowhere")

    score(RECORD, {}, failing_at_length)
    assert "failed (ValueError: no answer: nowhere); its completion" in caplog.text


def test_function_cannot_change_the_row_of_other_samples() -> None:
    columns = {"answer": 1}
    score(RECORD, columns, lambda row, text: row.pop("answer"))
    assert columns == {"answer": 1}


def lengths(prompt_rows: list[dict[str, Any]], completion_texts: list[str]) -> list[float]:
    return [float(len(text)) + row["base"] for row, text in zip(prompt_rows, completion_texts, strict=True)]


async def judged(prompt_row: dict[str, Any], completion_text: str) -> float:
    return 1.0


def test_batches_are_scored_in_one_call() -> None:
    reward = load_reward({"_target_": f"{HERE}.lengths", "_batch_": 3})
    assert reward is not None
    calls = []
    scorer = Scorer(reward._replace(function=lambda rows, texts: calls.append(len(rows)) or lengths(rows, texts)))
    scored = [len(scorer.add(replace(RECORD, sample=i), {"base": float(i)})) for i in range(7)]
    assert scored == [0, 0, 3, 0, 0, 3, 0]
    (last,) = scorer.flush()
    assert (last.sample, last.reward) == (6, len(RECORD.text) + 6.0)
    assert calls == [3, 3, 1]
    assert scorer.flush() == []


def test_row_that_breaks_its_batch_fails_alone() -> None:
    scorer = Scorer(Reward(lengths, 3))
    results = [scorer.add(replace(RECORD, sample=i), {"base": 1.0} if i != 1 else {}) for i in range(3)][-1]
    assert [record.error_class for record in results] == ["", "reward_failed", ""]


def test_wrong_number_of_rewards_fails_the_batch() -> None:
    scorer = Scorer(Reward(lambda rows, texts: [1.0], 2))
    scorer.add(RECORD, {})
    for record in scorer.add(RECORD, {}):
        assert record.error == "The function returned 1 rewards for 2 completions."


@pytest.mark.parametrize(("name", "batch", "why"), [("judged", None, "is async"), ("lengths", 0, "at least 1")])
def test_async_functions_and_empty_batches_are_refused(name: str, batch: int | None, why: str) -> None:
    with pytest.raises(InputError, match=why):
        load_reward({"_target_": f"{HERE}.{name}", "_batch_": batch})


@pytest.mark.parametrize("returned", [{0: 1.0, 1: 2.0}, {1.0, 2.0}, "12", b"12", 1.0, None])
def test_batch_of_rewards_in_no_order_is_an_error(returned: Any) -> None:
    scorer = Scorer(Reward(lambda rows, texts: returned, batch=2))
    assert scorer.add(RECORD, {}) == []
    scored = scorer.add(RECORD, {})
    assert [record.reward for record in scored] == [None, None]
    for record in scored:
        assert record.error.startswith(f"TypeError: the function returned {returned!r}, but must return a list")


def test_argument_that_the_reward_does_not_take_is_named() -> None:
    with pytest.raises(InputError, match="got an unexpected keyword argument 'no_such_argument'"):
        load_reward({"_target_": f"{HERE}.length", "no_such_argument": 1})
