"""The allowed values of a job's configuration."""

from __future__ import annotations

from datetime import datetime

from rollout.config.deadline import FORMS, seconds_until
from rollout.config.schema import Config, ModelConfig
from rollout.engine_arguments import argument_checks
from rollout.errors import Check
from rollout.sampling_params import PARAMETER_NAMES

DTYPES = ("auto", "float32", "bfloat16", "float16")
TRACKERS = ("none", "tensorboard", "wandb", "trackio", "mlflow")
FORMATS = ("parquet", "jsonl")
CHECKS = ("fast", "full")
LOGPROBS = ("both", "model", "none")


def config_checks(config: Config) -> list[Check]:
    """Return one check for each value that its type alone does not limit."""
    return [*_model_checks(config.model), *_engine_checks(config), *_other_checks(config)]


#: The configuration group of each of the engine's arguments.
_ENGINE_GROUPS = {
    "latency_budget_ms": "batcher",
    "max_rows": "batcher",
    "min_rows": "batcher",
    "max_kv_bytes": "memory",
    "reserve_fraction": "memory",
    "keep_prefixes_bytes": "memory",
    "attention": "model",
}


def _engine_checks(config: Config) -> list[Check]:
    checks = argument_checks(
        latency_budget_ms=config.batcher.latency_budget_ms,
        max_rows=config.batcher.max_rows,
        min_rows=config.batcher.min_rows,
        max_kv_bytes=config.memory.max_kv_bytes,
        reserve_fraction=config.memory.reserve_fraction,
        keep_prefixes_bytes=config.memory.keep_prefixes_bytes,
        attention=config.model.attention,
        none="null",
    )
    return [check._replace(name=f"{_ENGINE_GROUPS[check.name]}.{check.name}") for check in checks]


def _model_checks(model: ModelConfig) -> list[Check]:
    device, device_map, adapter, sliced = model.device, model.device_map, model.adapter, model.tensor_parallel
    reference = model.reference
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
        Check("model.reference", reference, reference != "", "a folder, a hub id or a GGUF file, or null for none"),
        Check("model.reference", reference, not (sliced and reference), f"null {with_slices}"),
        Check("model.reference", reference, not (device_map and reference), "null where model.device_map is set"),
    ]


def _other_checks(config: Config) -> list[Check]:
    data, output, sampling, job = config.data, config.output, config.sampling, config.job
    keep = data.keep_columns
    are_names = isinstance(keep, str) or (isinstance(keep, list) and all(isinstance(name, str) for name in keep))
    return [
        Check("data.path", data.path, bool(data.path), "a file, a folder, a hub id or builtin:arithmetic"),
        Check("data.limit", data.limit, data.limit is None or data.limit >= 1, "at least 1, or null for no limit"),
        Check("data.keep_columns", keep, are_names and keep != "", "all, a list of columns, or [] for none"),
        Check(
            "data.sampling_columns",
            data.sampling_columns,
            _is_column_mapping(data.sampling_columns),
            "a mapping of sampling parameters to columns; n is the same for all rows, the others are "
            + ", ".join(PARAMETER_NAMES[1:]),
        ),
        Check("sampling.defaults", sampling.defaults, sampling.defaults in ("none", "model"), "none or model"),
        Check(
            "data.chat_template_kwargs",
            data.chat_template_kwargs,
            data.chat_template_kwargs is None or isinstance(data.chat_template_kwargs, dict),
            "a mapping of names to values, e.g. {enable_thinking: false}",
        ),
        Check(
            "data.add_special_tokens",
            data.add_special_tokens,
            data.add_special_tokens in ("auto", True, False),
            "auto, true or false",
        ),
        Check("output.dir", output.dir, bool(output.dir), "a folder"),
        Check("output.format", output.format, output.format in FORMATS, f"one of {', '.join(FORMATS)}"),
        Check("output.logprobs", output.logprobs, output.logprobs in LOGPROBS, f"one of {', '.join(LOGPROBS)}"),
        Check("output.rows_per_shard", output.rows_per_shard, output.rows_per_shard >= 1, "at least 1"),
        Check("output.check", output.check, output.check in CHECKS, f"one of {', '.join(CHECKS)}"),
        Check("job.deadline", job.deadline, _is_to_come(job.deadline), FORMS),
        Check("job.lease_seconds", job.lease_seconds, 1 <= job.lease_seconds <= 86400, "from 1 to 86400, a day"),
        Check("tracker", config.tracker, config.tracker in TRACKERS, f"one of {', '.join(TRACKERS)}"),
        Check("seed", config.seed, -(2**63) <= config.seed < 2**63, "a 64-bit integer"),
    ]


def _is_to_come(deadline: str | None) -> bool:
    seconds = 0.0 if deadline is None else seconds_until(deadline, datetime.now().astimezone())
    return seconds is not None and seconds >= 0


def _is_column_mapping(given: object) -> bool:
    """Return whether a value maps sampling parameters, of which ``n`` is none of a row's, to names of columns."""
    if given is None:
        return True
    columns = isinstance(given, dict) and all(isinstance(column, str) and column for column in given.values())
    return columns and set(given) <= set(PARAMETER_NAMES) - {"n"}  # type: ignore[call-overload]
