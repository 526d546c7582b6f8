"""The schema of a job's configuration, and its validation; default values live in ``conf/``, one folder per group."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from rollout.batcher.registry import PARAMETERS, POLICIES, make_policy
from rollout.batcher.types import Bounds, Policy
from rollout.engine_arguments import argument_checks
from rollout.errors import Check, InputError, check_all
from rollout.sampling_params import SamplingParams

CONFIG_MODULE = "rollout.conf"
CONFIG_NAME = "config"
VERSION_BASE = "1.3"
DTYPES = ("auto", "float32", "bfloat16", "float16")
FORMATS = ("parquet", "jsonl")

# Nothing changes these dataclasses after `validate`. They are not `frozen=True` because OmegaConf treats frozen
# dataclasses as read-only, and Hydra must merge groups and overrides into them.


@dataclass
class ModelConfig:
    """The model, its dtype, its device and its attention backend."""

    path: str = MISSING
    dtype: str = MISSING
    device: str = MISSING
    device_map: str | None = MISSING
    tensor_parallel: bool = MISSING
    revision: str | None = MISSING
    adapter: str | None = MISSING
    trust_remote_code: bool = MISSING
    attention: str = MISSING


@dataclass
class DataConfig:
    """The dataset, and how each input row becomes a prompt."""

    path: str = MISSING
    name: str | None = MISSING
    split: str = MISSING
    prompt_column: str = MISSING
    id_column: str | None = MISSING
    length_hint_column: str | None = MISSING
    lengths_from: str | None = MISSING
    limit: int | None = MISSING
    as_chat: bool = MISSING
    system_prompt: str | None = MISSING


@dataclass
class SamplingConfig:
    """How completions are sampled: the fields of :class:`rollout.sampling_params.SamplingParams`."""

    n: int = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    top_k: int = MISSING
    min_p: float = MISSING
    max_new_tokens: int = MISSING
    stop: list[str] = MISSING
    stop_token_ids: list[int] = MISSING
    ignore_eos: bool = MISSING

    def params(self) -> SamplingParams:
        """Return the sampling parameters for the engine.

        Raises:
            InputError: a value is out of range.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        try:
            return SamplingParams(**values | {"stop": tuple(self.stop), "stop_token_ids": tuple(self.stop_token_ids)})
        except InputError as error:
            # Its sentences begin with the name of the parameter.
            raise InputError(f"sampling.{error}") from error


@dataclass
class BatcherConfig:
    """The settings of every policy: its name, and the bounds that its decisions are clamped to."""

    name: str = MISSING
    latency_budget_ms: float | None = MISSING
    max_rows: int = MISSING
    min_rows: int = MISSING

    def policy(self) -> Policy:
        """Build the configured policy.

        Raises:
            InputError: a value is out of range.
        """
        if self.name not in POLICIES:
            raise InputError(f"batcher.name is {self.name!r}, but must be one of {', '.join(POLICIES)}.")
        bounds = Bounds(min_rows=self.min_rows, max_rows=self.max_rows, latency_budget_ms=self.latency_budget_ms)
        common = {field.name for field in fields(BatcherConfig)}
        parameters = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in common}
        try:
            return make_policy(self.name, bounds, **parameters)
        except ValueError as error:
            # The message begins with the name of the parameter.
            raise InputError(f"batcher.{error}") from error


def _batcher_schema(policy: str) -> type[BatcherConfig]:
    """Return the schema of ``batcher=POLICY``: the common keys, then the policy's own parameters and defaults."""
    if policy not in PARAMETERS:
        return BatcherConfig
    return make_dataclass(f"{policy.title()}BatcherConfig", (), bases=(PARAMETERS[policy], BatcherConfig))


# `asdict` of an instance is stored in run.json, in the order of its fields.
BATCHER_SCHEMAS = {policy: _batcher_schema(policy) for policy in POLICIES}


@dataclass
class MemoryConfig:
    """How much device memory the KV pool may take."""

    max_kv_bytes: int | None = MISSING
    reserve_fraction: float = MISSING


@dataclass
class OutputConfig:
    """The run directory, the format of its shards, and their size in input rows."""

    dir: str = MISSING
    format: str = MISSING
    rows_per_shard: int = MISSING


@dataclass
class RewardConfig:
    """The function that scores completions: a Hydra ``_target_``, and its further arguments."""

    _target_: str | None = MISSING


@dataclass
class Config:
    """The whole configuration of a job. ``reward`` is None, or a dict with the key ``_target_``."""

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    sampling: SamplingConfig = MISSING
    batcher: BatcherConfig = MISSING
    memory: MemoryConfig = MISSING
    output: OutputConfig = MISSING
    reward: Any = None
    seed: int = MISSING


def register() -> None:
    """Register the schemas with Hydra; the YAML files name them in their defaults lists."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, name, node in (
        ("model", "schema", ModelConfig),
        ("data", "schema", DataConfig),
        ("sampling", "schema", SamplingConfig),
        *(("batcher", f"schema_{policy}", schema) for policy, schema in BATCHER_SCHEMAS.items()),
        ("memory", "schema", MemoryConfig),
        ("output", "schema", OutputConfig),
        ("reward", "schema", RewardConfig),
    ):
        store.store(group=group, name=name, node=node)


def load_config(overrides: Sequence[str] = ()) -> Config:
    """Return the validated configuration that ``python -m rollout OVERRIDES`` would run with."""
    register()
    with initialize_config_module(CONFIG_MODULE, version_base=VERSION_BASE, job_name="rollout"):
        return validate(compose(CONFIG_NAME, list(overrides)))


def validate(composed: DictConfig) -> Config:
    """Convert the composed configuration into a `Config` whose values are all in range.

    Raises:
        InputError: a key is unknown, a required key has no value, or a value is out of range.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        keys = " and ".join(missing)
        raise InputError(f"{keys} must be given, e.g. {missing[0]}={_EXAMPLES.get(missing[0], 'VALUE')}.")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    reward = OmegaConf.to_container(composed.reward, resolve=True)
    config.reward = reward if isinstance(reward, dict) and reward.get("_target_") else None
    _refuse_unknown_keys(composed, config)
    config.sampling.params()
    config.batcher.policy()
    check_all((*_model_checks(config.model), *_engine_checks(config), *_other_checks(config)))
    return config


def unknown_key(key: str, known: Sequence[str]) -> InputError:
    """Return the error for a key that does not exist, naming the nearest one that does."""
    return InputError(f"There is no key {key}; the nearest is {nearest(key, known)}.")


def nearest(key: str, known: Sequence[str]) -> str:
    """Return the known key that ``key`` most likely means: the same last part first, then the closest spelling."""
    last_part = key.rsplit(".", 1)[-1]
    candidates = [k for k in known if k.rsplit(".", 1)[-1] == last_part] or known
    return difflib.get_close_matches(key, candidates, n=1, cutoff=0)[0]


def dotted_keys(config: Config) -> list[str]:
    """Return all keys that an override can name."""
    keys = []
    for group in fields(config):
        value = getattr(config, group.name)
        if is_dataclass(value):
            keys += [f"{group.name}.{field.name}" for field in fields(value)]
        else:
            keys.append(group.name)
    return keys


def _refuse_unknown_keys(composed: DictConfig, config: Config) -> None:
    """Refuse keys that ``+group.key=value`` added but no dataclass declares; Hydra accepts them."""
    known = dotted_keys(config)
    for group, node in composed.items():
        if group == "reward":
            # Its keys are the arguments of the user's function.
            continue
        present = [f"{group!s}.{key!s}" for key in node] if isinstance(node, DictConfig) else [str(group)]
        for key in present:
            if key not in known:
                raise unknown_key(key, known)


_EXAMPLES = {"output.dir": "runs/my_run", "data.path": "prompts.jsonl", "model.path": "org/model"}

#: The configuration group of each of the engine's arguments.
_ENGINE_GROUPS = {
    "latency_budget_ms": "batcher",
    "max_rows": "batcher",
    "min_rows": "batcher",
    "max_kv_bytes": "memory",
    "reserve_fraction": "memory",
    "attention": "model",
}


def _engine_checks(config: Config) -> list[Check]:
    checks = argument_checks(
        latency_budget_ms=config.batcher.latency_budget_ms,
        max_rows=config.batcher.max_rows,
        min_rows=config.batcher.min_rows,
        max_kv_bytes=config.memory.max_kv_bytes,
        reserve_fraction=config.memory.reserve_fraction,
        attention=config.model.attention,
        none="null",
    )
    return [check._replace(name=f"{_ENGINE_GROUPS[check.name]}.{check.name}") for check in checks]


def _model_checks(model: ModelConfig) -> list[Check]:
    device, device_map, adapter, sliced = model.device, model.device_map, model.adapter, model.tensor_parallel
    with_slices = "where model.tensor_parallel is true"
    index = device.removeprefix("cuda").removeprefix(":")
    is_device = device in ("auto", "cpu", "cuda") or (device.startswith("cuda:") and index.isdigit())
    return [
        Check("model.path", model.path, bool(model.path), "a folder, a hub id or a GGUF file"),
        Check("model.dtype", model.dtype, model.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        Check("model.device", device, is_device, "auto, cpu, cuda or cuda:N"),
        Check("model.device_map", device_map, device_map in (None, "auto"), "auto, or null for one device"),
        Check("model.device", device, device_map is None or device == "auto", "auto where model.device_map is set"),
        Check("model.device", device, not sliced or device == "auto", f"auto {with_slices}"),
        Check("model.device_map", device_map, not (sliced and device_map), f"null {with_slices}"),
        Check("model.adapter", adapter, not (sliced and adapter), f"null {with_slices}"),
    ]


def _other_checks(config: Config) -> list[Check]:
    data, output = config.data, config.output
    return [
        Check("data.path", data.path, bool(data.path), "a file, a folder, a hub id or builtin:arithmetic"),
        Check("data.limit", data.limit, data.limit is None or data.limit >= 1, "at least 1, or null for no limit"),
        Check("output.dir", output.dir, bool(output.dir), "a folder"),
        Check("output.format", output.format, output.format in FORMATS, f"one of {', '.join(FORMATS)}"),
        Check("output.rows_per_shard", output.rows_per_shard, output.rows_per_shard >= 1, "at least 1"),
        Check("seed", config.seed, -(2**63) <= config.seed < 2**63, "a 64-bit integer"),
    ]
