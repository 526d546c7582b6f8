"""Where a model's files are, and whether they may and can be read: before anything heavy is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rollout.models.loading.default_model import PREFIX, packaged_folder

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
HUB_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
# Folders inside a repository hold the same weights for other programs.
HUB_LEFT_OUT = ("*/*", "consolidated*")


def resolve_path(path: str, revision: str | None = None, *, weights: bool = True, code: bool = False) -> str:
    """The folder or GGUF file on this machine that ``model.path`` means; what a fingerprint has to cover.

    A packaged model is converted the first time. A Hub id is downloaded into the Hub's own cache: with
    ``weights=False`` all but the weights, with ``code=True`` the model's Python files too.

    Raises:
        ValueError: there is no such model; the message is one sentence naming the key.
    """
    if path.startswith(PREFIX):
        _no_revision(path, revision)
        return str(packaged_folder(path.removeprefix(PREFIX)))
    local = Path(path).expanduser()
    if path and local.exists():
        _no_revision(path, revision)
        return str(local)
    if path.endswith(".gguf") or not HUB_ID.fullmatch(path):
        raise ValueError(f"model.path {path!r} does not exist: give a model folder, a GGUF file or a Hub id.")
    patterns = (*HUB_FILES, *(("*.safetensors",) if weights else ()), *(("*.py",) if code else ()))
    return _download(path, revision, patterns)


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no checkpoint of one model in safetensors.

    Raises:
        ValueError: files are missing, or could only be read by unpickling; one sentence saying what to do.
    """
    has_config, has_adapter = (folder / CONFIG).is_file(), (folder / ADAPTER_CONFIG).is_file()
    if has_adapter and not has_config:
        raise ValueError(
            f"model.path {str(folder)!r} is a PEFT adapter, not a model: "
            "set model.path to the model it was trained on and model.adapter to this folder."
        )
    if has_adapter:
        # Whether transformers would apply it depends on what is installed, so the run would too.
        raise ValueError(
            f"model.path {str(folder)!r} holds both a model and a PEFT adapter: "
            "move the adapter's files to a folder of their own and name that in model.adapter."
        )
    if not has_config:
        raise ValueError(
            f"model.path {str(folder)!r} has no {CONFIG}: give a folder that save_pretrained wrote, or a GGUF file."
        )
    _check_weights(folder)


def check_adapter(folder: Path) -> None:
    """Refuse a folder that is no PEFT adapter in safetensors.

    Raises:
        ValueError: one sentence saying what is missing.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"model.adapter {str(folder)!r} has no {name}: give a folder that PEFT's save_pretrained wrote."
            )


def _check_weights(folder: Path) -> None:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model.path {str(folder)!r} has a {CONFIG} that is not valid JSON ({error}).") from error
    # A configuration may name its weights file itself, and that may be a pickle.
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    candidates = (named,) if isinstance(named, str) else (WEIGHTS, WEIGHTS_INDEX)
    name = next((name for name in candidates if (folder / name).is_file()), None)
    if name is None:
        _no_weights(folder)
    elif name.endswith(".index.json"):
        _check_index(folder, name)
    elif not name.endswith(".safetensors"):
        _no_weights(folder)


def _check_index(folder: Path, name: str) -> None:
    try:
        shards = sorted(set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model.path {str(folder)!r} has a {name} that cannot be read: copy it again.") from error
    if not all(str(shard).endswith(".safetensors") for shard in shards):
        _no_weights(folder)
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ValueError(
            f"model.path {str(folder)!r} lacks {', '.join(missing)}, which its {name} names: copy it again."
        )


def _no_weights(folder: Path) -> None:
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"model.path {str(folder)!r} has its weights as pickles only ({', '.join(pickles)}), which can run code "
            "when they are read: load it once where you trust it, and write it with save_pretrained."
        )
    raise ValueError(f"model.path {str(folder)!r} has no weights as safetensors: give a folder that has {WEIGHTS}.")


def _no_revision(path: str, revision: str | None) -> None:
    if revision is not None:
        raise ValueError(f"model.revision is {revision!r}, but model.path {path!r} is no Hub id: leave it null.")


def _download(path: str, revision: str | None, patterns: Sequence[str]) -> str:
    try:
        return snapshot_download(
            path, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(HUB_LEFT_OUT)
        )
    except GatedRepoError as error:
        reason = "the Hub asks you to accept its terms: do so on its page, then run `hf auth login`"
        raise ValueError(f"model.path {path!r} cannot be downloaded: {reason}.") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"model.revision {revision!r} does not exist in the Hub's {path!r}.") from error
    except RepositoryNotFoundError as error:
        reason = "neither a folder here nor a model that the Hub shows (for a private one, run `hf auth login`)"
        raise ValueError(f"model.path {path!r} is {reason}.") from error
    except LocalEntryNotFoundError as error:
        reason = "no folder or file here, not in the Hub's cache, and the Hub cannot be reached"
        raise ValueError(
            f"model.path {path!r} is {reason}: check the path, or download it once with `hf download {path}`."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path {path!r} cannot be downloaded from the Hub: {first_line(error)}.") from error


def first_line(error: BaseException) -> str:
    """The gist of another library's message, for a sentence of ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('. ')}" if lines else type(error).__name__
