"""The job's configuration: its shape and types; the default values live in ``conf/``, one folder a group."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from rollout.batcher.registry import make_policy
from rollout.batcher.types import Bounds, Policy
from rollout.errors import InputError
from rollout.models.attention.names import ATTENTIONS
from rollout.sampling_params import SamplingParams

CONFIG_MODULE = "rollout.conf"
CONFIG_NAME = "config"
VERSION_BASE = "1.3"
DTYPES = ("auto", "float32", "bfloat16", "float16")
FORMATS = ("parquet", "jsonl")

# These are values: nothing changes them after `validated`. They cannot be `frozen=True`, because Hydra
# merges the groups and overrides into them and OmegaConf takes frozen dataclasses as read-only.


@dataclass
class ModelConfig:
    """Which model, as what, and where it runs."""

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
    """Which prompts, and how a row of the dataset becomes one."""

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
        """The same as the engine takes it.

        Raises:
            InputError: a value is out of range.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return SamplingParams(**values | {"stop": tuple(self.stop), "stop_token_ids": tuple(self.stop_token_ids)})


@dataclass
class BatcherConfig:
    """What every policy has: its name and the bounds that hold whatever it decides."""

    name: str = MISSING
    latency_budget_ms: float | None = MISSING
    max_rows: int = MISSING
    min_rows: int = MISSING

    def policy(self) -> Policy:
        """A new policy as configured.

        Raises:
            InputError: a value is out of range.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self) if f not in fields(BatcherConfig)}
        try:
            return make_policy(self.name, Bounds(self.min_rows, self.max_rows, self.latency_budget_ms), **own)
        except ValueError as error:
            # Its sentences begin with the name of the parameter.
            raise InputError(f"batcher.{error}") from error


@dataclass
class MemoryBatcherConfig(BatcherConfig):
    """Parameters of the paper's Algorithm 1."""

    epsilon_m: float = MISSING
    form: str = MISSING
    length_window: int = MISSING


@dataclass
class SlaBatcherConfig(BatcherConfig):
    """Parameters of the paper's Algorithm 2."""

    alpha: int = MISSING
    delta: int = MISSING
    epsilon_d: float | None = MISSING
    step_window: int = MISSING


@dataclass
class PaperBatcherConfig(BatcherConfig):
    """Parameters of both, of which the smaller row target holds."""

    epsilon_m: float = MISSING
    form: str = MISSING
    length_window: int = MISSING
    alpha: int = MISSING
    delta: int = MISSING
    epsilon_d: float | None = MISSING
    step_window: int = MISSING


@dataclass
class PredictiveBatcherConfig(BatcherConfig):
    """Parameters of the policy that learns lengths and step times."""

    memory_rows: int = MISSING


@dataclass
class MemoryConfig:
    """How much device memory the KV pool may take."""

    max_kv_bytes: int | None = MISSING
    reserve_fraction: float = MISSING


@dataclass
class OutputConfig:
    """Where the run is written, and in which pieces."""

    dir: str = MISSING
    format: str = MISSING
    rows_per_shard: int = MISSING


@dataclass
class RewardConfig:
    """What scores completions: a Hydra ``_target_``, and the further arguments that it takes."""

    _target_: str | None = MISSING


@dataclass
class Config:
    """All of a job. ``reward`` is None, or a dict with the key ``_target_``."""

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    sampling: SamplingConfig = MISSING
    batcher: BatcherConfig = MISSING
    memory: MemoryConfig = MISSING
    output: OutputConfig = MISSING
    reward: Any = None
    seed: int = MISSING


def register() -> None:
    """Tell Hydra the types of the configuration; the YAML files name them in their defaults lists."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, name, node in (
        ("model", "schema", ModelConfig),
        ("data", "schema", DataConfig),
        ("sampling", "schema", SamplingConfig),
        ("batcher", "schema_static", BatcherConfig),
        ("batcher", "schema_memory", MemoryBatcherConfig),
        ("batcher", "schema_sla", SlaBatcherConfig),
        ("batcher", "schema_paper", PaperBatcherConfig),
        ("batcher", "schema_predictive", PredictiveBatcherConfig),
        ("memory", "schema", MemoryConfig),
        ("output", "schema", OutputConfig),
        ("reward", "schema", RewardConfig),
    ):
        store.store(group=group, name=name, node=node)


def load_config(overrides: Sequence[str] = ()) -> Config:
    """The configuration that ``python -m rollout OVERRIDES`` would run with, validated."""
    register()
    with initialize_config_module(CONFIG_MODULE, version_base=VERSION_BASE, job_name="rollout"):
        return validated(compose(CONFIG_NAME, list(overrides)))


def validated(composed: DictConfig) -> Config:
    """The composed configuration as a :class:`Config` whose values are all in range.

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
    for key, value, right, wanted in (*_model_checks(config), *_memory_checks(config), *_other_checks(config)):
        if not right:
            raise InputError(f"{key} is {value!r}, but must be {wanted}.")
    return config


def nearest(key: str, keys: Sequence[str]) -> str:
    """The key that someone who wrote ``key`` most likely meant: the same last part first, then the spelling."""
    leaf = key.rsplit(".", 1)[-1]
    return difflib.get_close_matches(key, [k for k in keys if k.rsplit(".", 1)[-1] == leaf] or keys, n=1, cutoff=0)[0]


def dotted_keys(config: Config) -> list[str]:
    """All keys that an override can name."""
    return [
        f"{group.name}.{field.name}" if is_dataclass(value) else group.name
        for group in fields(config)
        for value in [getattr(config, group.name)]
        for field in (fields(value) if is_dataclass(value) else [group])
    ]


def _refuse_unknown_keys(composed: DictConfig, config: Config) -> None:
    """``+group.key=value`` may add what no dataclass declares; Hydra lets it pass."""
    known = dotted_keys(config)
    for group, node in composed.items():
        if group == "reward":
            # It takes whatever arguments its function has.
            continue
        present = [f"{group!s}.{key!s}" for key in node] if isinstance(node, DictConfig) else [str(group)]
        for key in present:
            if key not in known:
                raise InputError(f"There is no key {key}; the nearest is {nearest(key, known)}.")


_EXAMPLES = {"output.dir": "runs/my_run", "data.path": "prompts.jsonl", "model.path": "org/model"}

_WITH_TENSOR_PARALLEL = "where model.tensor_parallel is true"

Check = tuple[str, object, bool, str]
"""A key, its value, whether that is right, and what would be."""


def _model_checks(config: Config) -> list[Check]:
    model = config.model
    device = model.device
    index = device.removeprefix("cuda").removeprefix(":")
    return [
        ("model.path", model.path, bool(model.path), "a folder, a hub id or a GGUF file"),
        ("model.dtype", model.dtype, model.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        ("model.attention", model.attention, model.attention in ATTENTIONS, f"one of {', '.join(ATTENTIONS)}"),
        (
            "model.device",
            device,
            device in ("auto", "cpu", "cuda") or (device.startswith("cuda:") and index.isdigit()),
            "auto, cpu, cuda or cuda:N",
        ),
        ("model.device_map", model.device_map, model.device_map in (None, "auto"), "auto, or null for one device"),
        ("model.device", device, model.device_map is None or device == "auto", "auto where model.device_map is set"),
        ("model.device", device, not model.tensor_parallel or device == "auto", f"auto {_WITH_TENSOR_PARALLEL}"),
        (
            "model.device_map",
            model.device_map,
            not (model.tensor_parallel and model.device_map),
            f"null {_WITH_TENSOR_PARALLEL}",
        ),
        (
            "model.adapter",
            model.adapter,
            not (model.tensor_parallel and model.adapter),
            f"null {_WITH_TENSOR_PARALLEL}",
        ),
    ]


def _memory_checks(config: Config) -> list[Check]:
    budget, memory = config.batcher.latency_budget_ms, config.memory
    return [
        ("batcher.latency_budget_ms", budget, budget is None or budget > 0, "above 0, or null for no budget"),
        (
            "memory.max_kv_bytes",
            memory.max_kv_bytes,
            memory.max_kv_bytes is None or memory.max_kv_bytes > 0,
            "above 0, or null for all headroom",
        ),
        (
            "memory.reserve_fraction",
            memory.reserve_fraction,
            0 <= memory.reserve_fraction < 1,
            "at least 0 and below 1",
        ),
    ]


def _other_checks(config: Config) -> list[Check]:
    data, output = config.data, config.output
    return [
        ("data.path", data.path, bool(data.path), "a file, a folder, a hub id or builtin:arithmetic"),
        ("data.limit", data.limit, data.limit is None or data.limit >= 1, "at least 1, or null for all rows"),
        ("output.dir", output.dir, bool(output.dir), "a folder"),
        ("output.format", output.format, output.format in FORMATS, f"one of {', '.join(FORMATS)}"),
        ("output.rows_per_shard", output.rows_per_shard, output.rows_per_shard >= 1, "at least 1"),
        ("seed", config.seed, -(2**63) <= config.seed < 2**63, "a 64-bit integer"),
    ]
