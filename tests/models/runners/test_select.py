"""Selection of the run strategy, and the message when no strategy can run a model."""

from __future__ import annotations

import pytest
import torch

from rollout.models.errors import UnsupportedModel
from rollout.models.runners.packed import PackedStrategy
from rollout.models.runners.padded import PaddedStrategy
from rollout.models.runners.recurrent import RecurrentStrategy
from rollout.models.runners.select import select_strategy
from tests.support.tiny_models import tiny


def test_family_that_uses_the_attention_interface_is_packed() -> None:
    assert isinstance(select_strategy(tiny("llama")), PackedStrategy)


def test_family_with_its_own_attention_is_padded() -> None:
    assert isinstance(select_strategy(tiny("bloom")), PaddedStrategy)


def test_recurrent_family_gets_the_recurrent_strategy() -> None:
    assert isinstance(select_strategy(tiny("falcon_h1")), RecurrentStrategy)


def test_model_that_fails_the_parity_check_is_refused_with_its_error() -> None:
    model = tiny("bloom")

    def fail(*_: object) -> None:
        raise ZeroDivisionError("no such\nluck")

    model.transformer.h[1].register_forward_pre_hook(fail)
    with pytest.raises(
        UnsupportedModel, match=r"'bloom'\) fails in the padded strategy: ZeroDivisionError: no such\. "
    ):
        select_strategy(model)


def test_out_of_memory_in_the_parity_check_is_raised() -> None:
    model = tiny("llama")

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("none left")

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        select_strategy(model)


def test_model_without_a_strategy_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModel, match=r"'recurrent_gemma'.*recurrent state"):
        select_strategy(tiny("recurrent_gemma"))
