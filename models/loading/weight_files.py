"""Check the files of a checkpoint's weights before they are read: complete, in safetensors, and really there."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
#: How the stand-ins begin that git leaves where the Hub's large files were not downloaded.
_LFS_POINTER = b"version https://git-lfs"
#: Longest header of a safetensors file, as the library has it.
_MAX_HEADER_BYTES = 100_000_000


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of a model folder.

    Raises:
        ValueError: it holds no JSON object; one sentence that names it.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path {str(folder)!r} has a {name} that is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"path {str(folder)!r} has a {name} that holds no JSON object: copy it again.")
    return content


def check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model folder whose weights are missing, incomplete or pickled.

    Args:
        config: content of the model's configuration file.

    Raises:
        ValueError: one sentence that names the file and what to do.
    """
    # A configuration may name its own weights file, which may be a pickle.
    named = config.get("transformers_weights")
    candidates = (named,) if isinstance(named, str) else (WEIGHTS, WEIGHTS_INDEX)
    name = next((name for name in candidates if (folder / name).is_file()), None)
    if name is None:
        _refuse_weights(folder)
    elif name.endswith(".index.json"):
        _check_index(folder, name)
    elif name.endswith(".safetensors"):
        _check_file(folder, name)
    else:
        _refuse_weights(folder)


def _check_index(folder: Path, name: str) -> None:
    """Refuse an index whose shards are missing, incomplete or pickled."""
    weight_map = read_json(folder, name).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"path {str(folder)!r} has a {name} that cannot be read: copy it again.")
    shards = sorted({str(shard) for shard in weight_map.values()})
    if not all(shard.endswith(".safetensors") for shard in shards):
        _refuse_weights(folder)
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ValueError(f"path {str(folder)!r} lacks {', '.join(missing)}, which its {name} names: copy it again.")
    for shard in shards:
        _check_file(folder, shard)


def _check_file(folder: Path, name: str) -> None:
    """Refuse a safetensors file that is shorter or longer than its header says."""
    size = (folder / name).stat().st_size
    with open(folder / name, "rb") as file:
        start = file.read(max(8, len(_LFS_POINTER)))
        if start.startswith(_LFS_POINTER):
            raise ValueError(
                f"path {str(folder)!r} has a {name} that is only a Git LFS pointer: run `git lfs pull` there."
            )
        header_bytes = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        expected = None
        if 0 < header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
            file.seek(8)
            expected = _length(file.read(header_bytes))
    if expected is None or 8 + header_bytes + expected != size:
        raise ValueError(
            f"path {str(folder)!r} has a {name} that is broken or incomplete ({size:,} bytes): copy it again."
        )


def _length(header: bytes) -> int | None:
    """Return the bytes of all tensors that a header describes, None if it is no header."""
    try:
        entries = json.loads(header)
        return max(
            (int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"), default=0
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _refuse_weights(folder: Path) -> NoReturn:
    """Raise the error of a folder without safetensors; it names the weights that the folder has instead."""
    path = f"path {str(folder)!r}"
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{path} has its weights as pickles only ({', '.join(pickles)}), which can run code "
            "when they are read: load the model once where you trust it, and write it with save_pretrained."
        )
    gguf = sorted(file.name for file in folder.glob("*.gguf"))
    if gguf:
        raise ValueError(f"{path} has its weights as GGUF ({', '.join(gguf)}): set path to one of these files.")
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise ValueError(
            f"{path} has {shown}, but neither {WEIGHTS} nor {WEIGHTS_INDEX}: copy all files of the model, in the "
            "layout of transformers."
        )
    raise ValueError(f"{path} has no weights as safetensors: give a folder that has {WEIGHTS}.")
