"""Sampling parameters: values out of range are refused by name."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig

from rollout import sampling_params
from rollout.errors import InputError
from rollout.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", -1),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("min_p", float("nan")),
        ("max_new_tokens", 0),
        ("stop", [""]),
        ("stop", ["a", ""]),
        ("stop", ""),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("min_new_tokens", -1),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: float("inf")}),
        ("logit_bias", {-1: 0.5}),
        ("bad_words", [" "]),
        ("bad_words", [[]]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-3]),
        ("stop_token_ids", [1 << 40]),
        # Of the wrong type:
        ("n", "a"),
        ("n", 1.5),
        ("n", True),
        ("temperature", "0.7"),
        ("temperature", None),
        ("temperature", False),
        ("top_k", float("nan")),
        ("top_p", [0.9]),
        ("max_new_tokens", None),
        ("max_new_tokens", np.float64("inf")),
        ("ignore_eos", 1),
        ("ignore_eos", None),
        ("stop", None),
        ("stop", [1]),
        ("stop", {"a": 1}),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [1.5]),
        ("logit_bias", 3),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: "2"}),
        ("bad_words", 7),
        ("bad_words", [3, 4]),
        ("allowed_token_ids", "abc"),
    ],
)
def test_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{name} is .*, but must be .+\.$") as error:
        SamplingParams(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"n": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_new_tokens": 1},
        {"n": 1000, "temperature": 100.0, "top_p": 1e-9, "top_k": 1 << 40, "min_p": 1.0, "max_new_tokens": 1 << 20},
    ],
)
def test_ends_of_ranges_are_allowed(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert all(getattr(params, name) == value for name, value in values.items())


def test_defaults_match_the_command_line() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_new_tokens, params.stop, params.stop_token_ids, params.ignore_eos) == (256, (), (), False)


def test_lists_become_tuples() -> None:
    one = SamplingParams(stop=["a", "b"], stop_token_ids=[1, 2])  # type: ignore[arg-type]
    other = SamplingParams(stop=("a", "b"), stop_token_ids=(1, 2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != SamplingParams(stop=("a",), stop_token_ids=(1, 2))


def test_numbers_of_other_libraries_become_pythons_own() -> None:
    params = SamplingParams(
        n=np.int32(2),  # type: ignore[arg-type]
        temperature=Decimal("0.5"),  # type: ignore[arg-type]
        top_p=np.float32(0.5),
        max_new_tokens=12.0,  # type: ignore[arg-type]
        ignore_eos=np.bool_(True),  # type: ignore[arg-type]
        stop_token_ids=np.array([3, 4]),  # type: ignore[arg-type]
        logit_bias={"7": 1, np.int64(5): -math.inf},  # type: ignore[dict-item]
    )
    assert params == SamplingParams(
        n=2,
        temperature=0.5,
        top_p=0.5,
        max_new_tokens=12,
        ignore_eos=True,
        stop_token_ids=(3, 4),
        logit_bias=((5, -math.inf), (7, 1.0)),
    )
    kinds = [type(getattr(params, name)) for name in ("n", "temperature", "top_p", "max_new_tokens", "ignore_eos")]
    assert kinds == [int, float, float, int, bool]


def test_words_and_biases_keep_their_kinds_when_parameters_are_copied() -> None:
    params = SamplingParams(bad_words=["a b", [1, 2]], logit_bias={4: 1.0})  # type: ignore[arg-type]
    assert params.bad_words == ("a b", (1, 2))
    copy = replace(params, n=3)
    assert (copy.bad_words, copy.logit_bias) == (params.bad_words, params.logit_bias)


def test_minimum_above_the_maximum_is_refused() -> None:
    with pytest.raises(InputError, match="min_new_tokens is 9, but must be at most max_new_tokens=8"):
        SamplingParams(min_new_tokens=9, max_new_tokens=8)


def test_generation_config_gives_parameters_and_overrides_win() -> None:
    recommended = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_k=20,
        repetition_penalty=1.05,
        eos_token_id=2,
        bad_words_ids=[[2], [5, 6]],
        suppress_tokens=[9],
        sequence_bias={(4,): 1.5},
    )
    params = SamplingParams.from_generation_config(recommended, temperature=1.0, n=4)
    assert params == SamplingParams(
        n=4, top_k=20, repetition_penalty=1.05, bad_words=((5, 6),), logit_bias={4: 1.5, 9: -math.inf}
    )
    assert SamplingParams.from_generation_config(GenerationConfig(do_sample=False)) == SamplingParams(temperature=0.0)
    assert SamplingParams.from_generation_config(None) == SamplingParams()


def test_single_stop_string_is_not_split() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]


def test_sampling_params_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().n = 2  # type: ignore[misc]


def test_defaults_are_as_their_rules_leave_them() -> None:
    """They are not converted when parameters are made."""
    for rule in sampling_params._RULES:
        default = getattr(SamplingParams(), rule.name)
        assert sampling_params._converted(rule, default) == default
