"""Load a model and its tokenizer. Each failure is one sentence that begins with the parameter at fault."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rollout.models.device import cpu_multiplies
from rollout.models.errors import UnsupportedModel, clause
from rollout.models.loading.adapter import require_adapter, with_adapter
from rollout.models.loading.architecture import select_architecture
from rollout.models.loading.chat_template import own_template
from rollout.models.loading.checkpoint import check_folder, has_tokenizer, locate, resolve_path
from rollout.models.loading.gguf import read_model, read_tokenizer, require_gguf
from rollout.models.loading.gguf_conversion import converted_folder
from rollout.models.loading.multi_gpu import device_map_options, refuse_disk_offload, tensor_parallel_options
from rollout.models.loading.quantization import refuse_quantization, refuse_unread_scales

__all__ = ["ModelSource", "load_model", "load_tokenizer", "resolve_device", "resolve_dtype", "resolve_path"]

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which model to load and how; a job's model configuration has the same names and defaults.

    Args:
        path: a folder, a GGUF file, a Hub id or ``packaged:NAME``.
        device_map: with "auto", accelerate spreads the layers over the CUDA devices of this process.
        tensor_parallel: transformers gives each process of the launch a slice of every layer.
        adapter: a folder with a PEFT adapter, which is merged into the weights.
    """

    path: str
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    tensor_parallel: bool = False
    revision: str | None = None
    adapter: str | None = None
    trust_remote_code: bool = False


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, or its adapter's own; the weights of a Hub id are not downloaded.

    Raises:
        ValueError: there is none, or it cannot be read; one sentence that begins with the parameter.
    """
    files = locate(source.path, source.revision, source.adapter, weights=False, code=source.trust_remote_code)
    path = files.tokenizer
    if path.is_file():
        path = _converted_gguf(source, path, resolve_device(source.device))
    try:
        if path.is_file():
            tokenizer = read_tokenizer(path)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=source.trust_remote_code)
    except Exception as error:
        parameter = f"path {source.path!r}" if files.tokenizer == files.model else f"adapter {str(path)!r}"
        reason = clause(error) if path.is_file() or has_tokenizer(path) else "none of its files are there"
        raise ValueError(
            f"{parameter} has no tokenizer that can be loaded ({reason}): save the model's tokenizer beside it."
        ) from error
    template = own_template(files, tokenizer.chat_template)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def load_model(source: ModelSource, device: torch.device) -> nn.Module:
    """Load a model onto its device in eval mode, with its adapter merged.

    An adapter that cannot be merged stays around the transformers module.

    Raises:
        UnsupportedModel: it is no causal language model, or its architecture is unknown.
        ValueError: it is missing or cannot be loaded; one sentence that begins with the parameter.
    """
    path, adapter = locate(source.path, source.revision, source.adapter, code=source.trust_remote_code)
    adapter_config = None if adapter is None else require_adapter(adapter)
    if path.is_file():
        path = _converted_gguf(source, path, device)
    base = _from_gguf(source, path, device) if path.is_file() else _from_folder(source, path, device)
    if not (source.device_map or source.tensor_parallel):
        _move_to_device(base, device)
    model: nn.Module = base
    if adapter is not None:
        model = with_adapter(base, adapter, adapter_config, device, _tokenizer_size(source, adapter))
    model.eval()
    return model


def _tokenizer_size(source: ModelSource, adapter: Path) -> int | None:
    """Return the number of ids of an adapter's own tokenizer, None if it has none."""
    return len(load_tokenizer(source)) if has_tokenizer(adapter) else None


def resolve_device(device: str = "auto") -> torch.device:
    """Return the device of this process: with ``auto``, the CUDA device of its local rank, else the CPU.

    Raises:
        ValueError: the device does not exist on this machine.
    """
    if device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        wanted = torch.device("cuda" if device == "auto" else device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, but must be auto, cpu, cuda or cuda:N.") from error
    if wanted.type != "cuda":
        return wanted
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = _own_device(count) if wanted.index is None else wanted.index
    if index >= count:
        raise ValueError(
            f"device is {device!r}, which is cuda:{index} for this process, but {count} CUDA devices are "
            "visible: start at most one process per device, or set device=cpu."
        )
    return torch.device("cuda", index)


def _own_device(count: int) -> int:
    """Return the index of this process's device among those that it sees.

    SLURM shows the tasks of a node their own devices only, or all of them the same ones.
    """
    if "LOCAL_RANK" not in os.environ and "SLURM_STEP_ID" in os.environ and count:
        return int(os.environ.get("SLURM_LOCALID", "0")) % count
    return int(os.environ.get("LOCAL_RANK", "0"))


def resolve_dtype(dtype: str, device: torch.device, stored: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype to load weights in; None means the stored dtype.

    ``auto`` selects the stored dtype on an accelerator, and on a CPU that has matrix instructions for it. On other
    CPUs it selects float32: half precision runs several times slower there, and float32 holds its values exactly.

    Args:
        stored: dtype of the weights in the checkpoint; None if unknown.

    Raises:
        ValueError: the name is unknown.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, but must be one of auto, {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    if device.type != "cpu":
        return None
    if stored in (torch.bfloat16, torch.float16) and cpu_multiplies(stored):
        return stored
    if stored not in (None, torch.float32):
        logger.info("dtype=auto selects float32: this CPU has no matrix instructions for the checkpoint's %s.", stored)
    return torch.float32


def _from_folder(source: ModelSource, folder: Path, device: torch.device) -> PreTrainedModel:
    check_folder(folder)
    config = _config(source, folder)
    refuse_quantization(config, source.path)
    architecture = select_architecture(config, source.path, trust_remote_code=source.trust_remote_code)
    dtype = resolve_dtype(source.dtype, device, _stored_dtype(config))
    placement: dict[str, Any] = {}
    if source.device_map is not None:
        placement = device_map_options(
            source.path, config, architecture.model_class, device=device, device_map=source.device_map
        )
    elif source.tensor_parallel:
        placement = tensor_parallel_options(source.path, config)
    arguments: dict[str, Any] = {
        "config": config,
        "dtype": "auto" if dtype is None else dtype,
        "use_safetensors": True,
        "trust_remote_code": source.trust_remote_code,
        "output_loading_info": True,
        **placement,
    }
    try:
        loaded: Any = architecture.auto_class.from_pretrained(folder, **arguments)
    except Exception as error:
        if "ignore_mismatched_sizes" in str(error):
            # transformers has only logged which weights these are.
            loaded = architecture.auto_class.from_pretrained(folder, **arguments, ignore_mismatched_sizes=True)
            raise ValueError(_mismatch(source.path, loaded[1]["mismatched_keys"])) from error
        raise ValueError(f"path {source.path!r} cannot be loaded ({clause(error)}).") from error
    model: PreTrainedModel = loaded[0]
    if source.device_map is not None:
        refuse_disk_offload(source.path, model)
    # transformers fills missing weights with random numbers and continues.
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise ValueError(
            f"path {source.path!r} lacks {len(missing)} weights of {type(model).__name__} ({shown}): "
            "the checkpoint is incomplete, or belongs to another kind of model."
        )
    refuse_unread_scales(source.path, loaded[1]["unexpected_keys"])
    return model


def _mismatch(path: str, mismatched: Iterable[tuple[str, Any, Any]]) -> str:
    """Return a sentence about weights whose size is not that of the configuration."""
    found = sorted((name, list(stored), list(expected)) for name, stored, expected in mismatched)
    example = f", such as {found[0][0]}: {found[0][1]} instead of {found[0][2]}" if found else ""
    return (
        f"path {path!r} has {len(found)} weights of another size than its config.json says{example}: "
        "the configuration and the weights belong to different models."
    )


def _converted_gguf(source: ModelSource, path: Path, device: torch.device) -> Path:
    """Return the folder of a converted GGUF file, or the file itself if the cache has no room."""
    _check_gguf(path)
    if source.device_map or source.tensor_parallel:
        remedy = "leave device_map unset" if source.device_map else "turn tensor_parallel off"
        raise ValueError(
            f"path {source.path!r} is a GGUF file, which is unpacked on one device: {remedy}, or give the "
            "model's folder."
        )
    # A GGUF file mostly stores quantized blocks, which are no torch dtype.
    dtype = resolve_dtype(source.dtype, device, None)
    with _naming_gguf(source):
        return converted_folder(path, dtype) or path


def _from_gguf(source: ModelSource, path: Path, device: torch.device) -> PreTrainedModel:
    dtype = resolve_dtype(source.dtype, device, None)
    with _naming_gguf(source):
        return read_model(path, "auto" if dtype is None else dtype)


@contextmanager
def _naming_gguf(source: ModelSource) -> Iterator[None]:
    """Turn the errors of reading a GGUF file into one sentence."""
    try:
        yield
    except Exception as error:
        message = f"path {source.path!r} cannot be loaded as GGUF ({clause(error)})."
        # transformers has no class of its own for an architecture that it cannot read from GGUF.
        if "not supported" in str(error):
            raise UnsupportedModel(message) from error
        raise ValueError(message) from error


def _check_gguf(path: Path) -> None:
    if path.suffix != ".gguf":
        raise ValueError(f"path {str(path)!r} is a file, but no GGUF file: give the model's folder.")
    require_gguf(path)


def _config(source: ModelSource, folder: Path) -> PreTrainedConfig:
    declared: dict[str, Any] = PreTrainedConfig.get_config_dict(folder)[0]
    model_type = declared.get("model_type")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except Exception as error:
        if "auto_map" in declared and not source.trust_remote_code:
            raise UnsupportedModel(
                f"path {source.path!r} needs its own Python code: read it, and if you trust it "
                "set trust_remote_code=true."
            ) from error
        if model_type in CONFIG_MAPPING or "auto_map" in declared:
            raise ValueError(f"path {source.path!r} has a config.json that is not valid ({clause(error)}).") from error
        if not model_type:
            raise UnsupportedModel(
                f"path {source.path!r} has a config.json without a model_type, so it is no model of transformers: "
                "give a folder that save_pretrained wrote."
            ) from error
        raise UnsupportedModel(
            f"path {source.path!r} has the model_type {model_type!r}, which the installed transformers does not know: "
            "install a newer one, if there is one that does."
        ) from error
    return config


def _stored_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    stored = config.dtype or config.get_text_config(decoder=True).dtype
    return getattr(torch, stored) if isinstance(stored, str) else stored


def _move_to_device(model: PreTrainedModel, device: torch.device) -> None:
    try:
        cast(nn.Module, model).to(device)  # transformers' wrapper of Module.to is not typed as a method
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"path needs more memory for its weights than {device} has free: "
            "use a device with more memory, a smaller model, or dtype=bfloat16."
        ) from error
