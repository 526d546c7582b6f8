"""Convert GGUF files once, to safetensors in the Hugging Face layout, in the user's cache.

Reading a GGUF file is slow, because it is unpacked tensor by tensor. Later starts read the converted copy.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from rollout.models.cache_dir import cache_root
from rollout.models.loading.gguf import read_model, read_tokenizer

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the conversion below; increment it on each change, and older cache folders are no longer read."""

STALE_SECONDS = 3600
"""Age above which a temporary folder is a leftover of a killed conversion."""


def converted_folder(file: Path, dtype: torch.dtype | None) -> Path | None:
    """Return the converted copy of a GGUF file; convert it on first use. None if the cache has no room for it.

    The copy belongs to the file's path, size and time of change, and to the dtype; None is the file's own dtype.
    """
    stat = file.stat()
    identity = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    kind = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    folder = cache_root() / f"{file.stem}-format{FORMAT}-{kind}-{digest}"
    if not folder.exists():
        try:
            convert(file, folder, file.stem, dtype)
        except (OSError, SafetensorError) as error:
            logger.warning(
                "%s cannot be converted into %s (%s), so every start unpacks it again: set XDG_CACHE_HOME to a folder "
                "with room for the unpacked weights.",
                file.name,
                folder.parent,
                error,
            )
            return None
    return folder


def convert(file: Path, folder: Path, name: str, dtype: torch.dtype | None) -> None:
    """Write the converted model to ``folder``, which appears complete or not at all.

    Processes that start at the same time convert into separate temporary folders; the first to finish wins.

    Args:
        name: of the model, in the log and in its configuration.

    Raises:
        OSError, SafetensorError: the cache cannot be written.
    """
    logger.info("Converting %s into %s; this is done once.", name, folder)
    start = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder.parent)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        # A subfolder, because the context manager must still find its own folder to remove after the rename.
        converted = Path(work) / folder.name
        _save(file, converted, name, dtype)
        for written in converted.iterdir():
            _fsync(written)
        _publish(converted, folder)
    logger.info("Converted %s in %.0f s.", name, time.monotonic() - start)


def _save(file: Path, folder: Path, name: str, dtype: torch.dtype | None) -> None:
    """Read the GGUF model and its tokenizer and save both to ``folder``."""
    import torch

    loaded = read_model(file, "auto" if dtype is None else dtype)
    config = loaded.config
    # The GGUF file's title of the checkpoint, which is not a path to load from.
    vars(config).pop("_model_name_or_path", None)
    config.name_or_path = name
    # transformers refuses to save a module read from GGUF, so give its weights to a fresh one.
    with torch.device("meta"):
        fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)

    tokenizer = read_tokenizer(file)
    # GGUF stores the context length with the model only.
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    # Arguments of this load, which must not be saved with the tokenizer.
    for key in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)


def _publish(converted: Path, folder: Path) -> None:
    """Rename the converted folder into place; keep another process's copy if it was faster."""
    try:
        converted.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def _fsync(file: Path) -> None:
    """Flush a file to the disk, so that a power cut after the rename leaves no folder of empty files."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _remove_leftovers(root: Path) -> None:
    """Remove the temporary folders of killed conversions."""
    for folder in root.glob(".*-format*"):
        if folder.stat().st_mtime < time.time() - STALE_SECONDS:
            # Another process may be removing the same folder.
            shutil.rmtree(folder, ignore_errors=True)
