"""The fingerprint of a run: every setting its results depend on, so that one directory never mixes two runs."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from rollout.config.schema import Config, DataConfig, SamplingConfig
from rollout.errors import shorten
from rollout.sampling_params import PARAMETER_NAMES, SamplingParams

_HASHED_WHOLE_BYTES = 1 << 30
"""Files up to this size are hashed whole, larger ones by `_hash_blocks`."""
_BLOCK_BYTES = 1 << 20
_TENSOR_BLOCK_BYTES = 1 << 14
_TOKENIZER_PREFIXES = (
    *("tokenizer", "vocab", "merges", "special_tokens", "added_tokens"),
    *("chat_template", "spiece", "spm"),
)
_FIRST_PARAMETERS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "max_new_tokens"),
    *("stop", "stop_token_ids", "ignore_eos"),
)
_TEMPLATE_DATES = "data.template_dates"
_MODEL_SUFFIXES = (".safetensors", ".gguf", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")


class Fingerprint:
    """Values by dotted key, and one digest of them all; execution settings such as the device are left out."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        # Through JSON, so that a fingerprint read back from run.json compares equal.
        self.values: dict[str, Any] = json.loads(json.dumps(dict(values), sort_keys=True))

    @property
    def template_dates(self) -> dict[str, str]:
        """What the chat template's clock gives, by format."""
        return dict(self.values.get(_TEMPLATE_DATES) or {})

    def dated(self, dates: Mapping[str, str]) -> Fingerprint:
        """Return the fingerprint of a run whose chat template writes these dates."""
        return Fingerprint(self.values | {_TEMPLATE_DATES: dict(dates)}) if dates else self

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()


def fingerprint_of(
    config: Config,
    content: str,
    model: Path,
    adapter: Path | None = None,
    *,
    kept: Sequence[str] = (),
    kept_content: str = "",
) -> Fingerprint:
    """Compute the fingerprint of a job.

    Args:
        content: digest of the data (`rollout.data.prompts.Prompts.content`).
        model: the local folder or file of ``model.path``. Its contents are hashed, not its name: a moved or downloaded
            copy is the same model.
        adapter: the folder of its adapter.
        kept: the input columns in the output, by their names there.
        kept_content: digest of their values.
    """
    return Fingerprint(
        {
            "model.weights": weights_digest(model),
            "model.tokenizer": tokenizer_digest(model),
            "model.adapter": None if adapter is None else weights_digest(adapter),
            **({} if adapter is None else {"model.adapter_tokenizer": tokenizer_digest(adapter)}),
            "model.dtype": config.model.dtype,
            "model.trust_remote_code": config.model.trust_remote_code,
            "data.content": content,
            "data.keep_columns": list(kept),
            "data.kept_content": kept_content,
            "data.as_chat": config.data.as_chat,
            "data.system_prompt": config.data.system_prompt,
            **_encoding_values(config.data),
            **_sampling_values(config.sampling),
            # How many completions it takes at once changes no reward.
            "reward": config.reward and {key: value for key, value in config.reward.items() if key != "_batch_"},
            "output.format": config.output.format,
            "output.logprobs": config.output.logprobs,
            "output.skip_special_tokens": config.output.skip_special_tokens,
            "output.split_reasoning": config.output.split_reasoning,
            "seed": config.seed,
        }
    )


def _encoding_values(data: DataConfig) -> dict[str, Any]:
    """Return how prompts are encoded, where it is not by default; earlier runs do not have these keys."""
    values = {
        "chat_template": _content(data.chat_template),
        "chat_template_kwargs": data.chat_template_kwargs or None,
        "tools": _content(data.tools),
        "add_special_tokens": None if data.add_special_tokens == "auto" else data.add_special_tokens,
    }
    return {f"data.{name}": value for name, value in values.items() if value is not None}


def _content(file: str | None) -> str | None:
    """Return the digest of a file's content; other values, such as the name of a template, stand for themselves."""
    path = None if file is None else Path(file).expanduser()
    return file if path is None or not path.is_file() else hashlib.sha256(path.read_bytes()).hexdigest()


def _sampling_values(sampling: SamplingConfig) -> dict[str, Any]:
    """Return the sampling parameters that runs have always had, and the later ones that are not off.

    A run that began before a parameter existed can so be resumed.
    """
    params, off = sampling.params(), SamplingParams()
    values = {name: getattr(params, name) for name in PARAMETER_NAMES}
    return {
        f"sampling.{name}": value
        for name, value in values.items()
        if name in _FIRST_PARAMETERS or value != getattr(off, name)
    }


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """Return the keys whose values differ, sorted."""
    return sorted(key for key in old.values.keys() | new.values.keys() if old.values.get(key) != new.values.get(key))


def describe(old: Fingerprint, new: Fingerprint) -> str:
    """Format the differing keys with their old and new values."""
    return "; ".join(
        f"{key} was {_format_value(old.values.get(key))} and is {_format_value(new.values.get(key))}"
        for key in differences(old, new)
    )


def _format_value(value: object) -> str:
    """Format a value as JSON; a long one, such as a digest, by its beginning."""
    return shorten(json.dumps(value), longest=40, keep=13)


def weights_digest(model: Path) -> str:
    """Hash the weights, the configuration and the model's own code: every model file but the tokenizer's."""
    return _digest(file for file in _model_files(model) if not _is_of_tokenizer(file))


def tokenizer_digest(model: Path) -> str:
    """Hash the tokenizer and its chat template; a GGUF file holds them together with the weights."""
    return _digest(file for file in _model_files(model) if model.is_file() or _is_of_tokenizer(file))


def _model_files(model: Path) -> list[Path]:
    if model.is_file():
        return [model]
    # Other sub-folders hold separate checkpoints.
    found = [*model.glob("*"), *model.glob("additional_chat_templates/*")]
    return sorted(file for file in found if file.suffix in _MODEL_SUFFIXES and file.is_file())


def _is_of_tokenizer(file: Path) -> bool:
    return file.name.startswith(_TOKENIZER_PREFIXES) or file.suffix in (".model", ".jinja", ".tiktoken")


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        # Names identify the files of a folder. A single GGUF file is hashed by suffix, so that it may be renamed.
        digest.update(f"{file.suffix if file.suffix == '.gguf' else file.name}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as stream:
            if file.stat().st_size <= _HASHED_WHOLE_BYTES:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            else:
                _hash_blocks(stream, file, digest)
    return digest.hexdigest()


def _hash_blocks(stream: BinaryIO, file: Path, digest: Any) -> None:
    """Hash the beginning, the end and blocks between: reading a file of many gigabytes would take minutes.

    Of a safetensors file, hash the header and three blocks of each tensor, so that a change of any layer is noticed
    unless it spares all three blocks.
    """
    size = file.stat().st_size
    starts: list[int] = list(range(0, size, size // 64))
    block = _BLOCK_BYTES
    if file.suffix == ".safetensors":
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header = stream.read(header_bytes)
        digest.update(header)
        block = _TENSOR_BLOCK_BYTES
        starts = []
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                low, high = entry["data_offsets"]
                starts += [8 + header_bytes + start for start in (low, (low + high) // 2, max(low, high - block))]
        starts.sort()
    for start in (*starts, max(0, size - block)):
        stream.seek(start)
        digest.update(stream.read(block))
