"""Which tier a model gets, and what is said when there is none."""

from __future__ import annotations

import pytest

from rollout.models.errors import UnsupportedModel
from rollout.models.interface import InterfaceTier
from rollout.models.serve import serve
from tests.families import tiny


def test_a_family_of_the_interface_is_served_through_it() -> None:
    assert isinstance(serve(tiny("llama")), InterfaceTier)


def test_a_model_that_no_tier_serves_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModel, match=r"'recurrent_gemma'.*recurrent state"):
        serve(tiny("recurrent_gemma"))
