"""Which tier a model gets, and what is said when there is none."""

from __future__ import annotations

import pytest
import torch

from rollout.models.errors import UnsupportedModel
from rollout.models.runners.packed import PackedStrategy
from rollout.models.runners.padded import PaddedStrategy
from rollout.models.runners.recurrent import RecurrentStrategy
from rollout.models.runners.select import select_strategy
from tests.support.tiny_models import tiny


def test_a_family_of_the_interface_is_served_through_it() -> None:
    assert isinstance(select_strategy(tiny("llama")), PackedStrategy)


def test_a_family_with_attention_of_its_own_is_served_by_gathering() -> None:
    assert isinstance(select_strategy(tiny("bloom")), PaddedStrategy)


def test_a_recurrent_family_is_served_with_its_states() -> None:
    assert isinstance(select_strategy(tiny("falcon_h1")), RecurrentStrategy)


def test_a_model_that_fails_in_a_trial_is_refused_with_what_it_said() -> None:
    model = tiny("bloom")

    def fail(*_: object) -> None:
        raise ZeroDivisionError("no such\nluck")

    model.transformer.h[1].register_forward_pre_hook(fail)
    with pytest.raises(
        UnsupportedModel, match=r"'bloom'\) fails in the padded strategy: ZeroDivisionError: no such\. "
    ):
        select_strategy(model)


def test_want_of_memory_is_no_refusal() -> None:
    model = tiny("llama")

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("none left")

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        select_strategy(model)


def test_a_model_that_no_tier_serves_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModel, match=r"'recurrent_gemma'.*recurrent state"):
        select_strategy(tiny("recurrent_gemma"))
