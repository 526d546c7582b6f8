"""What a run's results depend on, so that a folder never holds results of two different runs."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from rollout.config import Config

WHOLE = 1 << 30
"""Files up to this size are hashed whole; of larger ones, as `_sampled` says."""
_BLOCK = 1 << 20
_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece", "spm")
_READ = (".safetensors", ".gguf", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")


class Fingerprint:
    """Values by dotted key, and one digest of all of them. Execution settings, such as the device, are not in it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        # As JSON gives it back, so that one read from a folder compares equal.
        self.values: dict[str, Any] = json.loads(json.dumps(dict(values), sort_keys=True))

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()


def fingerprint_of(config: Config, content: str, model: Path) -> Fingerprint:
    """The fingerprint of a job.

    Args:
        content: digest of the data (`rollout.data.prompts.Prompts.content`).
        model: the folder or file that ``model.path`` means on this machine. What it is called is not in the
            fingerprint, what it holds is: a moved or downloaded copy is the same model.
    """
    adapter = config.model.adapter
    return Fingerprint(
        {
            "model.weights": weights_digest(model),
            "model.tokenizer": tokenizer_digest(model),
            "model.adapter": None if adapter is None else weights_digest(Path(adapter).expanduser()),
            "model.dtype": config.model.dtype,
            "model.trust_remote_code": config.model.trust_remote_code,
            "data.content": content,
            "data.as_chat": config.data.as_chat,
            "data.system_prompt": config.data.system_prompt,
            **{f"sampling.{key}": value for key, value in asdict(config.sampling).items()},
            "reward": config.reward,
            "output.format": config.output.format,
            "seed": config.seed,
        }
    )


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """The keys whose values differ, sorted."""
    return sorted(key for key in old.values.keys() | new.values.keys() if old.values.get(key) != new.values.get(key))


def describe(old: Fingerprint, new: Fingerprint) -> str:
    """The differing keys with their values, for a message."""
    return "; ".join(
        f"{key} was {_short(old.values.get(key))} and is {_short(new.values.get(key))}" for key in differences(old, new)
    )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:13]}…"


def weights_digest(model: Path) -> str:
    """Digest of the weights, the configuration and the model's own code; all but the tokenizer."""
    return _digest(file for file in _files(model) if not _of_tokenizer(file))


def tokenizer_digest(model: Path) -> str:
    """Digest of the tokenizer and its chat template. A GGUF file holds them with the weights."""
    return _digest(file for file in _files(model) if model.is_file() or _of_tokenizer(file))


def _files(model: Path) -> list[Path]:
    if model.is_file():
        return [model]
    # Folders inside hold checkpoints of their own; chat templates are the one thing that is read from there.
    found = [*model.glob("*"), *model.glob("additional_chat_templates/*")]
    return sorted(file for file in found if file.suffix in _READ and file.is_file())


def _of_tokenizer(file: Path) -> bool:
    return file.name.startswith(_TOKENIZER) or file.suffix in (".model", ".jinja", ".tiktoken")


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        # A single file may have any name, as a model folder may; those in a folder are told apart by theirs.
        digest.update(f"{file.suffix if file.suffix == '.gguf' else file.name}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as stream:
            if file.stat().st_size <= WHOLE:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            else:
                _sampled(stream, file, digest)
    return digest.hexdigest()


def _sampled(stream: BinaryIO, file: Path, digest: Any) -> None:
    """Hash the beginning, the end and blocks between: reading all of a many-gigabyte file takes minutes.

    Of safetensors, the header and three blocks of each tensor, so that a change of any one layer shows unless
    it spares all three.
    """
    size = file.stat().st_size
    starts = range(0, size, size // 64)
    block = _BLOCK
    if file.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", stream.read(8))
        header = stream.read(length)
        digest.update(header)
        spans = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        block = 1 << 14
        starts_of = ((low, (low + high) // 2, max(low, high - block)) for low, high in spans)
        starts = sorted(8 + length + start for triple in starts_of for start in triple)  # type: ignore[assignment]
    for start in (*starts, max(0, size - block)):
        stream.seek(start)
        digest.update(stream.read(block))
