"""The configuration: its keys, its defaults and its validation."""

from __future__ import annotations

import os
from dataclasses import asdict, fields

import pytest

from rollout.batcher.registry import PARAMETERS, POLICIES
from rollout.config.compose import load_config
from rollout.config.keys import dotted_keys, nearest
from rollout.config.schema import BatcherConfig, SamplingConfig
from rollout.errors import InputError
from rollout.sampling_params import SamplingParams

OUT = "output.dir=out"


def test_defaults_match_the_contract() -> None:
    config = load_config([OUT])
    assert asdict(config.model) == {
        "path": "packaged:SmolLM2-135M-Instruct",
        "dtype": "auto",
        "device": "auto",
        "device_map": None,
        "tensor_parallel": False,
        "revision": None,
        "adapter": None,
        "reference": None,
        "trust_remote_code": False,
        "attention": "auto",
        "batch_invariant": False,
    }
    assert asdict(config.data) == {
        "path": "builtin:arithmetic",
        "name": None,
        "split": "train",
        "prompt_column": "prompt",
        "id_column": None,
        "length_hint_column": None,
        "lengths_from": None,
        "limit": None,
        "streaming": False,
        "as_chat": False,
        "system_prompt": None,
        "keep_columns": "all",
        "sampling_columns": None,
        "chat_template": None,
        "chat_template_kwargs": None,
        "tools": None,
        "add_special_tokens": "auto",
    }
    assert config.sampling.params() == SamplingParams()
    assert (config.batcher.name, config.batcher.latency_budget_ms) == ("predictive", None)
    assert (config.batcher.max_rows, config.batcher.min_rows) == (1024, 1)
    assert asdict(config.memory) == {"max_kv_bytes": None, "reserve_fraction": 0.05, "keep_prefixes_bytes": 0}
    assert asdict(config.output) == {
        "dir": "out",
        "format": "parquet",
        "rows_per_shard": 1024,
        "logprobs": "both",
        "skip_special_tokens": True,
        "split_reasoning": False,
        "check": "fast",
    }
    assert asdict(config.job) == {"deadline": None, "lease_seconds": 120}
    assert (config.reward, config.seed) == (None, 0)


def test_sampling_config_has_the_fields_of_sampling_params() -> None:
    assert [f.name for f in fields(SamplingConfig)] == [*(f.name for f in fields(SamplingParams)), "defaults"]


@pytest.mark.parametrize("name", POLICIES)
def test_policy_configs_match_the_parameters_of_policies(name: str) -> None:
    config = load_config([OUT, f"batcher={name}"]).batcher
    own = {key: value for key, value in asdict(config).items() if key not in {f.name for f in fields(BatcherConfig)}}
    assert own == (asdict(PARAMETERS[name]()) if name in PARAMETERS else {})
    assert isinstance(config.policy(), POLICIES[name])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("experiment", "n", "temperature", "reward"),
    [
        ("ppo_sampling", 4, 1.0, {"_target_": "rollout.arithmetic.exact_match", "_batch_": None}),
        ("grpo_sampling", 8, 1.0, {"_target_": "rollout.arithmetic.exact_match", "_batch_": None}),
        ("bulk_inference", 1, 0.0, None),
    ],
)
def test_experiments_set_their_values(experiment: str, n: int, temperature: float, reward: object) -> None:
    config = load_config([f"+experiment={experiment}", OUT, "data.path=prompts.jsonl"])
    assert (config.sampling.n, config.sampling.temperature, config.reward) == (n, temperature, reward)


def test_ppo_sampling_runs_without_another_key() -> None:
    config = load_config(["+experiment=ppo_sampling"])
    assert (config.output.dir, config.data.limit, config.data.as_chat) == ("runs/ppo_sampling", 64, True)


def test_bulk_inference_needs_data_and_output() -> None:
    with pytest.raises(InputError, match=r"^data\.path and output\.dir must be given"):
        load_config(["+experiment=bulk_inference"])


@pytest.mark.parametrize(
    ("override", "key", "wanted"),
    [
        ("sampling.temperature=-0.1", "sampling.temperature", "at least 0"),
        ("sampling.top_p=0", "sampling.top_p", "above 0"),
        ("sampling.top_p=1.1", "sampling.top_p", "at most 1"),
        ("sampling.max_new_tokens=0", "sampling.max_new_tokens", "at least 1"),
        ("sampling.n=0", "sampling.n", "at least 1"),
        ("sampling.min_p=2", "sampling.min_p", "to 1"),
        ("sampling.top_k=-1", "sampling.top_k", "at least 0"),
        ("sampling.stop=['']", "sampling.stop", "non-empty"),
        ("batcher.max_rows=0", "batcher.min_rows", "max_rows"),
        ("batcher.min_rows=0", "batcher.min_rows", "from 1"),
        ("batcher=paper batcher.epsilon_m=1", "batcher.epsilon_m", "between 0 and 1"),
        ("batcher=paper batcher.form=eq13", "batcher.form", "eq12"),
        ("batcher=paper batcher.alpha=0", "batcher.alpha", "at least 1"),
        ("batcher.memory_rows=0", "batcher.memory_rows", "at least 1"),
        ("batcher.latency_budget_ms=0", "batcher.latency_budget_ms", "above 0"),
        ("memory.max_kv_bytes=0", "memory.max_kv_bytes", "above 0"),
        ("memory.keep_prefixes_bytes=-1", "memory.keep_prefixes_bytes", "at least 0"),
        ("memory.reserve_fraction=1", "memory.reserve_fraction", "below 1"),
        ("output.format=csv", "output.format", "parquet, jsonl"),
        ("output.rows_per_shard=0", "output.rows_per_shard", "at least 1"),
        ("data.limit=0", "data.limit", "at least 1"),
        ("model.dtype=int8", "model.dtype", "float32"),
        ("model.device=gpu", "model.device", "cuda:N"),
        ("model.device_map=balanced", "model.device_map", "auto, or null"),
        ("job.lease_seconds=0", "job.lease_seconds", "from 1 to 86400"),
        ("job.lease_seconds=inf", "job.lease_seconds", "from 1 to 86400"),
        ("seed=9223372036854775808", "seed", "64-bit"),
        ("output.dir=''", "output.dir", "a folder"),
    ],
)
def test_values_out_of_range_are_refused(override: str, key: str, wanted: str) -> None:
    with pytest.raises(InputError) as refused:
        load_config([OUT, *override.split()])
    message = str(refused.value)
    assert message.startswith(key)
    assert wanted in message


@pytest.mark.parametrize("override", ["+sampling.foo=1", "+foo=1", "+batcher.alpah=3"])
def test_added_keys_are_refused(override: str) -> None:
    with pytest.raises(InputError, match=rf"There is no key {override[1:].split('=')[0]}; (the|`python)"):
        load_config([OUT, override])


@pytest.mark.parametrize(
    "key",
    ["model.path", "model.adapter", "model.reference", "data.path", "data.lengths_from", "data.tools", "output.dir"],
)
def test_home_is_expanded_in_every_path(key: str) -> None:
    config = load_config([OUT, f"{key}='~/mine'"])
    group, _, name = key.partition(".")
    assert getattr(getattr(config, group), name) == os.path.expanduser("~/mine")


def test_reward_accepts_further_keys() -> None:
    config = load_config([OUT, "reward._target_=package.score", "+reward.scale=2"])
    assert config.reward == {"_target_": "package.score", "_batch_": None, "scale": 2}


def test_nearest_prefers_the_same_last_part() -> None:
    keys = dotted_keys(load_config([OUT]))
    assert nearest("temperature", keys) == "sampling.temperature"
    assert nearest("sampler.max_new_token", keys) == "sampling.max_new_tokens"
    assert nearest("output.path", keys) in ("data.path", "model.path")
    assert nearest("Sampling_N", keys) == "sampling.n"


@pytest.mark.parametrize("key", ["quantum", "sampling.quantum", "lr", "data.zzz", "x"])
def test_no_key_is_nearest_to_one_that_resembles_none(key: str) -> None:
    assert nearest(key, dotted_keys(load_config([OUT]))) is None
