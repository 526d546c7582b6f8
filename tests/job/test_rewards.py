"""Rewards: loaded by name; a failure concerns one record only."""

from __future__ import annotations

from typing import Any

import pytest

from rollout.arithmetic import exact_match
from rollout.errors import InputError
from rollout.job.rewards import load_reward, score
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


class Scorer:
    def __init__(self, offset: float) -> None:
        self.offset = offset

    def __call__(self, prompt_row: dict[str, Any], completion_text: str) -> float:
        return self.offset + prompt_row["base"]


NOT_CALLABLE = 3


def test_reward_is_a_function_or_an_instance_of_a_class() -> None:
    assert load_reward(None) is None
    function = load_reward({"_target_": "rollout.arithmetic.exact_match"})
    assert function is not None
    assert function({"answer": "3"}, "3") == exact_match({"answer": "3"}, "3") == 1.0
    scaled = load_reward({"_target_": f"{HERE}.length", "scale": 0.5})
    assert scaled is not None
    assert scaled({}, "four") == 2.0
    instance = load_reward({"_target_": f"{HERE}.Scorer", "offset": 1.0})
    assert instance is not None
    assert instance({"base": 2.0}, "") == 3.0


@pytest.mark.parametrize(
    "config",
    [
        {"_target_": "no.such.module.score"},
        {"_target_": f"{HERE}.nothing"},
        {"_target_": f"{HERE}.NOT_CALLABLE"},
        {"_target_": f"{HERE}.takes_one"},
        {"_target_": f"{HERE}.length", "no_such_argument": 1},
        {"_target_": f"{HERE}.Scorer"},
        {"_target_": "not a name"},
        {"_target_": ""},
    ],
)
def test_invalid_reward_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"^reward\._target_={config['_target_']} "):
        load_reward(config)


def test_score_adds_the_reward() -> None:
    reward = load_reward({"_target_": f"{HERE}.length"})
    assert score(RECORD, {}, reward).reward == len(RECORD.text)
    assert score(RECORD, {}, None) is RECORD


def test_reward_that_raises_keeps_the_completion() -> None:
    result = score(RECORD, {}, failing)
    assert (result.error_class, result.error) == ("reward_failed", "KeyError: 'answer'")
    assert result.reward is None
    assert (result.completion_ids, result.finish_reason) == (RECORD.completion_ids, RECORD.finish_reason)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "many"])
def test_reward_that_is_not_finite_is_an_error(value: Any) -> None:
    result = score(RECORD, {}, lambda row, text: value)
    assert (result.error_class, result.reward) == ("reward_failed", None)


def test_error_records_are_not_scored() -> None:
    record = Record("row", 0, [], [], "", [], [], "error", "empty_prompt", "Empty.")
    assert score(record, {}, failing) is record
