"""What rewards depend on besides their arguments: the source of the user's modules, and the versions of packages."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import logging
import pkgutil
import platform
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

_INSTALLED = frozenset({"site-packages", "dist-packages"})
"""Folders of installed packages, whose version stands for the source of what is imported from them."""
_OWN = "rollout"
"""This package, whose version and source a run records for each attempt."""


class _Module(NamedTuple):
    """Where a module's code lies."""

    file: Path
    is_package: bool
    folder: Path
    """The one that is on Python's path."""

    @property
    def installed(self) -> bool:
        # Packages may be installed into any folder: `pip install --target`.
        return not _INSTALLED.isdisjoint(self.file.parts) or any(self.folder.glob("*.dist-info"))


def source_of(reward: Mapping[str, Any]) -> dict[str, str]:
    """Return the digest of each module, ``source.NAME``, and the version of each package, ``package.NAME``.

    The modules are the one that ``_target_`` names, the one that defines the function, class or object, and what these
    import by name, in turn. Of what lies in an installed package the version counts, of the standard library nothing.
    Imports that are computed, and files that a reward reads, are not seen. Any change of a file counts, also of its
    layout.

    Args:
        reward: the configuration, whose targets exist; arguments may have a ``_target_`` of their own.
    """
    found: dict[str, str] = {}
    for target in _targets(reward):
        defining = _defining_modules(target)
        if all(_is_standard(name) for name in defining):
            found["package.python"] = ".".join(platform.python_version_tuple()[:2])
        elif not any(_find(name) for name in defining):
            logger.warning(
                "The source of reward._target_=%s is in no file, so a change of it is not noticed when the run is "
                "resumed: name a function that a file defines.",
                target,
            )
        found |= _with_imports(defining)
    return dict(sorted(found.items()))


def _targets(value: Any) -> Iterator[str]:
    """Yield every ``_target_`` in a configuration."""
    if isinstance(value, Mapping):
        if isinstance(target := value.get("_target_"), str):
            yield target
        value = value.values()
    elif not isinstance(value, list):
        return
    for inner in value:
        yield from _targets(inner)


def _defining_modules(target: str) -> list[str]:
    """Return the modules that name and define what a target is."""
    found: Any = pkgutil.resolve_name(target)
    parts = target.replace(":", ".").split(".")
    prefixes = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    names = [next(name for name in prefixes if name in sys.modules)]
    while isinstance(found, functools.partial):
        found = found.func
    # An instance has the module of its class; of a decorated function, both the function and the decorator count.
    objects = [found, inspect.unwrap(found), getattr(found, "__self__", None)]
    names += [name for one in objects if isinstance(name := getattr(one, "__module__", None), str)]
    return list(dict.fromkeys(names))


def _with_imports(names: list[str]) -> dict[str, str]:
    """Return the digests of modules and of the user's that they import, and the versions of packages among them."""
    found: dict[str, str] = {}
    waiting, seen = deque(names), set(names)
    while waiting:
        name = waiting.popleft()
        package = name.partition(".")[0]
        own = package == _OWN
        module = None if _is_standard(name) or (own and name not in names) else _find(name)
        if module is None:  # also what a module imports from another and is no module
            continue
        versions = _versions(package) if module.installed and not own else {}
        found |= versions
        if versions and name not in names:
            continue
        code = module.file.read_bytes()
        found[f"source.{name}"] = hashlib.sha256(code).hexdigest()
        if module.file.suffix == ".py" and not (module.installed or own):
            imported = dict.fromkeys(_imports(code, name if module.is_package else name.rpartition(".")[0]))
            waiting += [other for other in imported if other not in seen]
            seen |= imported.keys()
    return found


def _is_standard(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def _find(name: str) -> _Module | None:
    """Return where a module's code lies, without importing it; None if there is no such module, or no file of it."""
    places: Any = None
    spec = None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        whole = ".".join(parts[:count])
        loaded = sys.modules.get(whole)
        spec = getattr(loaded, "__spec__", None)
        if loaded is None:
            specs = (finder.find_spec(whole, places) for finder in sys.meta_path)
            spec = next((found for found in specs if found is not None), None)
        if spec is None:
            break
        places = spec.submodule_search_locations
        if places is None and count < len(parts):
            return None
    file = spec.origin if spec is not None and spec.has_location else getattr(sys.modules.get(name), "__file__", None)
    if file is None or not Path(file).is_file():
        return None
    folders = Path(file).parents
    above = min(len(parts) - (places is None), len(folders) - 1)
    return _Module(Path(file), is_package=places is not None, folder=folders[above])


def _imports(code: bytes, package: str) -> Iterator[str]:
    """Yield the modules that a module imports anywhere in it, and the names that may be modules.

    Args:
        package: the package that relative imports begin at.
    """
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return  # a module that cannot be imported: nothing that it imports is used
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def _versions(package: str) -> dict[str, str]:
    """Return the versions of the distributions that have a package; none if no distribution has it."""
    return {f"package.{name}": metadata.version(name) for name in _distributions().get(package, ())}
