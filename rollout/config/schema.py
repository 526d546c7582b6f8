"""The schema of a job's configuration; default values live in ``conf/``, one folder per group."""

from __future__ import annotations

from dataclasses import dataclass, fields, make_dataclass
from typing import Any

from omegaconf import MISSING

from rollout.batcher.registry import PARAMETERS, POLICIES, make_policy
from rollout.batcher.types import Bounds, Policy
from rollout.errors import InputError
from rollout.sampling_params import PARAMETER_NAMES, SamplingParams

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
    reference: str | None = MISSING
    trust_remote_code: bool = MISSING
    attention: str = MISSING
    batch_invariant: bool = MISSING


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
    streaming: bool = MISSING
    as_chat: bool = MISSING
    system_prompt: str | None = MISSING
    keep_columns: Any = MISSING
    sampling_columns: Any = MISSING
    chat_template: str | None = MISSING
    chat_template_kwargs: Any = MISSING
    tools: str | None = MISSING
    add_special_tokens: Any = MISSING


@dataclass
class SamplingConfig:
    """How completions are sampled: the fields of :class:`rollout.sampling_params.SamplingParams`, and their origin."""

    n: int = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    top_k: int = MISSING
    min_p: float = MISSING
    max_new_tokens: int = MISSING
    stop: list[str] = MISSING
    stop_token_ids: list[int] = MISSING
    ignore_eos: bool = MISSING
    repetition_penalty: float = MISSING
    presence_penalty: float = MISSING
    frequency_penalty: float = MISSING
    min_new_tokens: int = MISSING
    logit_bias: Any = MISSING
    bad_words: Any = MISSING
    allowed_token_ids: Any = MISSING
    stop_at_turn_end: bool = MISSING
    defaults: str = MISSING
    """Hydra reserves this name in the files of a group, so ``conf/config.yaml`` sets it."""

    def params(self) -> SamplingParams:
        """Return the sampling parameters for the engine.

        Raises:
            InputError: a value is out of range.
        """
        try:
            return SamplingParams(**{name: getattr(self, name) for name in PARAMETER_NAMES})
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
    keep_prefixes_bytes: int = MISSING


@dataclass
class OutputConfig:
    """The run directory, the format of its shards, their size in input rows, and their columns."""

    dir: str = MISSING
    format: str = MISSING
    rows_per_shard: int = MISSING
    logprobs: str = MISSING
    skip_special_tokens: bool = MISSING
    split_reasoning: bool = MISSING
    check: str = MISSING


@dataclass
class JobConfig:
    """When a job must have ended, and how its workers know which of them are alive."""

    deadline: str | None = MISSING
    """In one of the forms of :mod:`rollout.config.deadline`; None: SLURM's time limit, where there is one."""
    lease_seconds: float = MISSING


@dataclass
class RewardConfig:
    """The function that scores completions: a Hydra ``_target_``, and its further arguments."""

    _target_: str | None = MISSING
    _batch_: int | None = MISSING


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
    job: JobConfig = MISSING
    tracker: str = MISSING
    seed: int = MISSING
