"""Sampling parameters: values out of range are refused by name."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

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
    ],
)
def test_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{name} is .*, but must be .+\.$") as error:
        SamplingParams(**{name: value})
    shown = ("",) if value == "" else tuple(value) if isinstance(value, list) else value
    assert repr(shown) in str(error.value)


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


def test_single_stop_string_is_not_split() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]


def test_sampling_params_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().n = 2  # type: ignore[misc]
