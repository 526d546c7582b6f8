"""The versions that an attempt of a run runs with, and how they differ from those of an earlier one."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

_PACKAGES = (
    *("rollout", "torch", "transformers", "tokenizers", "accelerate", "peft"),
    *("datasets", "pyarrow", "numpy", "hydra-core"),
)
_CODE = "rollout's source"
_CODE_OF = ("rollout", "rollout.batcher", "rollout.models", "rollout.conf")
"""The packages of this project, which lie inside the first once it is installed."""
_CODE_SUFFIXES = (".py", ".c", ".h", ".yaml")


@cache
def installed_versions() -> Mapping[str, str | None]:
    """Return the versions of the packages that results may depend on, None where one is not installed.

    Of this project's own code there is a digest as well, which tells apart commits of one version.
    """
    return {
        **{name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        _CODE: source_digest(),
    }


def changes(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[str]:
    """Return a sentence for each version that another attempt had otherwise.

    Args:
        before: what `installed_versions` returned in the attempt that began the run.
        now: what it returns now. A package that only one of them lists is left out.
    """
    return [
        f"This attempt runs {_shown(name, now[name])}; the run began with {was or 'none'}."
        for name, was in before.items()
        if name in now and now[name] != was
    ]


def _shown(name: str, version: str | None) -> str:
    return f"without {name}" if version is None else f"{name} {version}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def source_digest() -> str:
    """Return a short digest of this project's own code, the same wherever it is installed."""
    files: dict[str, Path] = {}
    for package in _CODE_OF:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            root = Path(folder)
            found = (path for path in root.rglob("*") if path.suffix in _CODE_SUFFIXES)
            files |= {f"{package.replace('.', '/')}/{path.relative_to(root).as_posix()}": path for path in found}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]
