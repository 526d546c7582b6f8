"""What a trainer's arguments ask of the engine: honoured, or refused in a sentence that names the key."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from rollout import SamplingParams
from rollout.errors import InputError
from rollout.integrations.trl import RolloutGRPOTrainer, rollout_func
from rollout.integrations.trl.sampling import trainer_params
from tests.support import trl_world

_TRLS: dict[str, Any] = {
    "max_new_tokens": 12,
    "do_sample": True,
    "pad_token_id": 0,
    "eos_token_id": [2],
    "top_k": 0,
} | {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "cache_implementation": None,
}
_DEFAULT = SamplingParams(max_new_tokens=12, ignore_eos=True, stop_token_ids=(2,))


def _params(own: dict[str, Any] | None = None, **changes: Any) -> SamplingParams:
    """The parameters of a trainer whose generation config TRL has changed, over a model's own."""
    model = trl_world.model()
    model.generation_config.update(**(own or {}))
    config = GenerationConfig(**_TRLS | changes, disable_compile=True)
    return trainer_params(SimpleNamespace(model=model, generation_config=config))


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"temperature": 0.7}, "temperature", 0.7),
        ({"top_p": 0.8}, "top_p", 0.8),
        ({"top_k": 7}, "top_k", 7),
        ({"min_p": 0.1}, "min_p", 0.1),
        ({"repetition_penalty": 1.2}, "repetition_penalty", 1.2),
        ({"max_new_tokens": 99}, "max_new_tokens", 99),
        ({"eos_token_id": [2, 7]}, "stop_token_ids", (2, 7)),
        ({"min_new_tokens": 3}, "min_new_tokens", 3),
        ({"stop_strings": ["w5"]}, "stop", ("w5",)),
        ({"suppress_tokens": [9]}, "logit_bias", ((9, float("-inf")),)),
        ({"do_sample": False}, "temperature", 0.0),
    ],
)
def test_a_parameter_is_honoured(changes: dict[str, Any], field: str, value: Any) -> None:
    assert _params() == _DEFAULT
    assert getattr(_params(**changes), field) == value


def test_the_models_own_configuration_fills_what_the_trainer_leaves_unset() -> None:
    """As transformers' generate does with TRL's configuration."""
    assert _params(own={"min_p": 0.2, "temperature": 0.3, "top_k": 5}).min_p == 0.2
    assert _params(own={"min_p": 0.2, "temperature": 0.3, "top_k": 5}).temperature == 1.0
    with pytest.raises(InputError, match="no_repeat_ngram_size=3"):
        _params(own={"no_repeat_ngram_size": 3})


@pytest.mark.parametrize(
    "changes",
    [
        {"num_beams": 4},
        {"typical_p": 0.5},
        {"max_time": 1.0},
        {"num_return_sequences": 2},
        {"cache_implementation": "quantized"},
    ],
)
def test_a_parameter_that_is_not_offered_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))) as caught:
        _params(**changes)
    assert str(caught.value).endswith("unset it.")


def test_a_cache_that_changes_no_token_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert _params(cache_implementation="static") == _DEFAULT
    assert "cache_implementation='static' has no effect" in caplog.text


def test_refusals_come_before_training(tmp_path: Path) -> None:
    def made(args: Any, **changes: Any) -> Any:
        return trl_world.trainer(RolloutGRPOTrainer, args, **changes)

    with pytest.raises(InputError, match="num_beams=2"):
        made(trl_world.grpo_args(tmp_path, generation_kwargs={"num_beams": 2}))
    with pytest.raises(InputError, match="engine_options names 'max_row', which is no argument of Engine"):
        made(trl_world.grpo_args(tmp_path), engine_options={"max_row": 3})
    with pytest.raises(InputError, match="rollout_func would generate"):
        made(trl_world.grpo_args(tmp_path), rollout_func=rollout_func())
    backend = "use_transformers_continuous_batching"
    if not hasattr(trl_world.grpo_args(tmp_path), backend):
        backend = "use_transformers_paged"
    with pytest.raises(InputError, match=f"unset {backend}"):
        made(trl_world.grpo_args(tmp_path, **{backend: True}))
