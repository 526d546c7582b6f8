"""Forms of sampling parameters: taken with their meaning, or refused."""

from __future__ import annotations

import logging
import math
from itertools import islice, repeat
from typing import Any

import pytest
from transformers import GenerationConfig

from rollout.engine.params_arguments import given_params
from rollout.errors import InputError
from rollout.sampling_params import SamplingParams

FIVE = SamplingParams(max_new_tokens=5)


def taken(params: Any, count: int = 2) -> list[SamplingParams]:
    return list(islice(given_params(params, [None] * count), count))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (None, [SamplingParams()] * 2),
        (FIVE, [FIVE] * 2),
        ({"max_new_tokens": 5}, [FIVE] * 2),
        ([FIVE, {"n": 2}], [FIVE, SamplingParams(n=2)]),
        ((FIVE, FIVE), [FIVE] * 2),
        (iter([FIVE, FIVE]), [FIVE] * 2),
        (repeat(FIVE), [FIVE] * 2),
    ],
)
def test_params_are_taken_in_any_form(params: Any, expected: list[SamplingParams]) -> None:
    assert taken(params) == expected


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("greedy", "params is 'greedy'"),
        (3, "params is 3"),
        ([FIVE], "params has 1 entries, but there are 2 prompts"),
        (iter([FIVE]), "params ends after 1 entries"),
        ([FIVE, None], "params has None"),
        ({"max_tokens": 3}, "'max_tokens', which is no sampling parameter; the nearest is 'max_new_tokens'"),
        ({"n": 0}, "n is 0"),
        ({3: 0}, "names 3"),
    ],
)
def test_other_params_are_refused(params: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        taken(params)


def test_generation_config_keeps_its_meaning(caplog: pytest.LogCaptureFixture) -> None:
    config = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=0.5, top_p=0.9, num_return_sequences=2)
    assert taken(config, 1) == [SamplingParams(n=2, max_new_tokens=5, temperature=0.5, top_p=0.9, top_k=50)]
    config = GenerationConfig(max_new_tokens=5, eos_token_id=[2, 3], stop_strings=["x"], num_beams=1)
    expected = SamplingParams(max_new_tokens=5, temperature=0, stop_token_ids=(2, 3), ignore_eos=True, stop=("x",))
    assert taken([config, config]) == [expected] * 2
    config = GenerationConfig(max_new_tokens=5, do_sample=True, repetition_penalty=1.5, suppress_tokens=[3], top_k=7)
    expected = SamplingParams(max_new_tokens=5, repetition_penalty=1.5, logit_bias={3: -math.inf}, top_k=7)
    assert taken(config, 1) == [expected]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert taken(GenerationConfig(max_new_tokens=5, temperature=0.5), 1) == [
            SamplingParams(max_new_tokens=5, temperature=0)
        ]
    assert "sets temperature=0.5, but not do_sample=True" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 5, "num_beams": 4}, "num_beams=4"),
        ({"max_new_tokens": 5, "max_time": 4.0}, "max_time=4.0"),
        ({"do_sample": True}, "sets no max_new_tokens"),
    ],
)
def test_generation_config_that_cannot_be_honoured_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        taken(GenerationConfig(**values))
