"""The context limit that a configuration states."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from rollout.models.module.inspect import context_limit


def config_of(**fields: Any) -> SimpleNamespace:
    text = SimpleNamespace(**fields)
    return SimpleNamespace(get_text_config=lambda decoder: text if decoder else None)


@pytest.mark.parametrize(
    ("model_type", "fields", "limit"),
    [
        ("llama", {"max_position_embeddings": 300}, 300),
        ("gpt2", {"n_positions": 70}, 70),
        ("opt", {"max_position_embeddings": 90}, 90),
        # Bloom has no position embeddings and states no limit.
        ("bloom", {}, None),
    ],
)
def test_context_limit_of_transformers_configurations(
    model_type: str, fields: dict[str, Any], limit: int | None
) -> None:
    assert context_limit(AutoConfig.for_model(model_type, **fields)) == limit


def test_scaling_independent_of_length_keeps_the_limit() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 100, "rope_theta": 1e4}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = AutoConfig.for_model("llama", max_position_embeddings=800, rope_parameters=rope)
    assert context_limit(config) == 800


def test_longrope_keeps_the_limit_beyond_the_original_length() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = AutoConfig.for_model(
        "phi3",
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=800,
        original_max_position_embeddings=100,
        rope_parameters=rope,
    )
    assert context_limit(config) == 800


def test_dynamic_scaling_limits_the_context_to_the_original_length() -> None:
    inside = {"rope_type": "dynamic", "original_max_position_embeddings": 60}
    assert context_limit(config_of(max_position_embeddings=500, rope_parameters=inside)) == 60
    beside = config_of(
        max_position_embeddings=500, rope_parameters={"rope_type": "dynamic"}, original_max_position_embeddings=70
    )
    assert context_limit(beside) == 70
    assert context_limit(config_of(max_position_embeddings=500, rope_parameters={"rope_type": "dynamic"})) == 500


def test_smallest_limit_of_all_layer_types_applies() -> None:
    nested = {
        "full_attention": {"rope_type": "dynamic", "original_max_position_embeddings": 90},
        "sliding_attention": {"rope_type": "default"},
        "rope_theta": 1e4,
    }
    assert context_limit(config_of(max_position_embeddings=500, rope_parameters=nested)) == 90
    nested["sliding_attention"] = {"rope_type": "dynamic", "original_max_position_embeddings": 40}
    assert context_limit(config_of(max_position_embeddings=500, rope_parameters=nested)) == 40


@pytest.mark.parametrize("fields", [{}, {"max_position_embeddings": None}, {"rope_parameters": None}])
def test_configuration_without_a_limit_gives_none(fields: dict[str, Any]) -> None:
    assert context_limit(config_of(**fields)) is None
