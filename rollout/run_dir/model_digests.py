"""Digests of a model's files: its weights and its tokenizer."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

_HASHED_WHOLE_BYTES = 1 << 30
"""Files up to this size are hashed whole, larger ones by `_hash_blocks`."""
_BLOCK_BYTES = 1 << 20
_TENSOR_BLOCK_BYTES = 1 << 14
_TOKENIZER_PREFIXES = (
    *("tokenizer", "vocab", "merges", "special_tokens", "added_tokens"),
    *("chat_template", "spiece", "spm"),
)
_MODEL_SUFFIXES = (".safetensors", ".gguf", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")


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
