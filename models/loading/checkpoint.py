"""Find a model's files and check that they can be read safely, before anything heavy is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rollout.models.errors import clause, first_line
from rollout.models.loading.default_model import PREFIX, packaged_folder
from rollout.models.loading.weight_files import WEIGHTS, WEIGHTS_INDEX, check_weights, read_json

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PIPELINE = "model_index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
HUB_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
# Subfolders of a repository hold the same weights in other programs' formats.
HUB_IGNORED = ("*/*", "consolidated*")


def resolve_path(path: str, revision: str | None = None, *, weights: bool = True, code: bool = False) -> str:
    """Return the local folder or GGUF file of a model; a run's fingerprint covers its content.

    A packaged model is converted on first use. A Hub id is downloaded into the Hub's own cache.

    Args:
        weights: also download the weights of a Hub id.
        code: also download its Python files.

    Raises:
        ValueError: there is no such model; the message is one sentence that begins with the parameter.
    """
    if path.startswith(PREFIX):
        _refuse_revision(path, revision)
        return str(packaged_folder(path.removeprefix(PREFIX)))
    local = Path(path).expanduser()
    if path and local.exists():
        _refuse_revision(path, revision)
        return str(local)
    if path.endswith(".gguf") or not HUB_ID.fullmatch(path):
        raise ValueError(f"path {path!r} does not exist: give a model folder, a GGUF file or a Hub id.")
    patterns = (*HUB_FILES, *(("*.safetensors",) if weights else ()), *(("*.py",) if code else ()))
    return _download(path, revision, patterns)


class ModelFiles(NamedTuple):
    """Where a model lies on this machine."""

    model: Path
    """Folder or GGUF file of the model."""
    adapter: Path | None
    """Folder of the adapter that is loaded onto it."""

    @property
    def tokenizer(self) -> Path:
        """Folder or GGUF file of the tokenizer: the adapter's, if it has one of its own."""
        return self.adapter if self.adapter is not None and has_tokenizer(self.adapter) else self.model


def locate(
    path: str, revision: str | None = None, adapter: str | None = None, *, weights: bool = True, code: bool = False
) -> ModelFiles:
    """Return the local files of a model and its adapter; a path to an adapter means its base model with the adapter.

    Args: as of `resolve_path`.
        adapter: folder of a PEFT adapter.

    Raises:
        ValueError: a model or an adapter is missing; one sentence that begins with the parameter.
    """
    found = Path(resolve_path(path, revision, weights=weights, code=code))
    folder = None if adapter is None else Path(adapter).expanduser()
    if folder is not None and not folder.is_dir():
        raise ValueError(f"adapter {adapter!r} is no folder here: give one that PEFT's save_pretrained wrote.")
    if not _is_adapter(found):
        return ModelFiles(found, folder)
    if folder is not None:
        raise ValueError(
            f"path {path!r} is itself a PEFT adapter, and only one is loaded: set path to the model that "
            f"adapter {adapter!r} was trained on."
        )
    base, base_revision = _base_of(path, found)
    remedy = "set path to the model it was trained on and adapter to this folder"
    try:
        model = Path(resolve_path(base, base_revision, weights=weights, code=code))
    except ValueError as error:
        raise ValueError(
            f"path {path!r} is a PEFT adapter of {base!r}, which is not found here ({first_line(error)}): {remedy}."
        ) from error
    if _is_adapter(model):
        raise ValueError(f"path {path!r} is a PEFT adapter of another adapter, {base!r}: merge that one first.")
    return ModelFiles(model, found)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no model; some trainers leave the model's configuration there."""
    return (folder / ADAPTER_CONFIG).is_file() and not any(
        (folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)
    )


def _base_of(path: str, folder: Path) -> tuple[str, str | None]:
    """Return the path and the revision of an adapter's base model."""
    config = read_json(folder, ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"path {path!r} is a PEFT adapter whose {ADAPTER_CONFIG} names no base model: "
            "set path to the model it was trained on and adapter to this folder."
        )
    return str(base), config.get("revision")


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a checkpoint of one model in safetensors.

    Raises:
        ValueError: files are missing, or could only be read by unpickling; one sentence with the remedy.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        # transformers would apply the adapter or not, depending on which packages are installed.
        raise ValueError(
            f"path {str(folder)!r} holds both a model and a PEFT adapter: "
            "move the adapter's files to a folder of their own and set adapter to it."
        )
    if (folder / PIPELINE).is_file():
        raise ValueError(
            f"path {str(folder)!r} is a diffusion pipeline ({PIPELINE}), which is no causal language model."
        )
    if not (folder / CONFIG).is_file():
        inner = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
        remedy = (
            f"give its folder {inner[-1]!r}" if inner else "give a folder that save_pretrained wrote, or a GGUF file"
        )
        raise ValueError(f"path {str(folder)!r} has no {CONFIG}: {remedy}.")
    check_weights(folder, read_json(folder, CONFIG))
    if (folder / GENERATION_CONFIG).is_file():
        # transformers would ignore a broken one, and with it the ids that end a completion.
        read_json(folder, GENERATION_CONFIG)


def check_adapter(folder: Path) -> None:
    """Refuse a folder that is not a PEFT adapter in safetensors.

    Raises:
        ValueError: a file is missing; one sentence that names it.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"adapter {str(folder)!r} has no {name}: give a folder that PEFT's save_pretrained wrote.")


def _refuse_revision(path: str, revision: str | None) -> None:
    """Refuse a revision of a model that is not on the Hub."""
    if revision is not None:
        raise ValueError(f"revision is {revision!r}, but path {path!r} is no Hub id: leave revision unset.")


def _download(path: str, revision: str | None, patterns: Sequence[str]) -> str:
    """Download the matching files of a Hub id and return their folder in the Hub's cache."""
    try:
        return snapshot_download(
            path, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(HUB_IGNORED)
        )
    except GatedRepoError as error:
        reason = "the Hub asks you to accept its terms: do so on its page, then run `hf auth login`"
        raise ValueError(f"path {path!r} cannot be downloaded: {reason}.") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"revision {revision!r} does not exist in the Hub's {path!r}.") from error
    except RepositoryNotFoundError as error:
        reason = "neither a folder here nor a model that the Hub shows (for a private one, run `hf auth login`)"
        raise ValueError(f"path {path!r} is {reason}.") from error
    except LocalEntryNotFoundError as error:
        reason = "no folder or file here, not in the Hub's cache, and the Hub cannot be reached"
        raise ValueError(
            f"path {path!r} is {reason}: check the path, or download it once with `hf download {path}`."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"path {path!r} cannot be downloaded from the Hub: {clause(error)}.") from error
