"""What ``conf/`` says about each key: its default, and the comment that stands behind it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import takewhile
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from rollout.batcher.registry import PARAMETERS
from rollout.config import schema

CONFIG_MODULE = "rollout.conf"
_KEY = re.compile(r"^(\w+): ([^#]*?)(?: # (.*))?$")


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the configuration."""

    name: str
    """With its group, as an override names it."""
    type: str
    default: str
    """As YAML has it; ``???`` where the key is required."""
    meaning: str


@dataclass(frozen=True, slots=True)
class Option:
    """A file that ``GROUP=OPTION`` or ``+experiment=OPTION`` selects."""

    name: str
    description: str


@dataclass(frozen=True, slots=True)
class Section:
    """The keys of a group that hold for all of its options, or those of one policy."""

    policy: str
    """The option of ``batcher`` whose own keys these are, or empty."""
    keys: list[Key]


@dataclass(frozen=True, slots=True)
class Group:
    """A configuration group, the options that it has, and the keys that can be set."""

    name: str
    options: list[Option]
    sections: list[Section]


@cache
def conf() -> Traversable:
    """Return the folder of configuration files, in the checkout or the installed package."""
    return resources.files(CONFIG_MODULE)


@cache
def groups() -> list[Group]:
    """Return the groups in the order of ``config.yaml``."""
    chosen: dict[str, str] = {}
    for default in file_values(conf() / "config.yaml")["defaults"]:
        if isinstance(default, dict):
            chosen |= {group: option for group, option in default.items() if not group.startswith("override ")}
    return [Group(name, options(name), _sections(name, option)) for name, option in chosen.items()]


@cache
def top_keys() -> list[Key]:
    """Return the keys that belong to no group."""
    names = {field.name for field in fields(schema.Config)}
    return [key for key in _keys("config", schema.Config) if key.name in names]


@cache
def all_keys() -> dict[str, Key]:
    """Return every key by its name."""
    keys = [key for group in groups() for section in group.sections for key in section.keys]
    return {key.name: key for key in [*keys, *top_keys()]}


def options(group: str) -> list[Option]:
    """Return the options of a group that a user can select."""
    files = sorted((conf() / group).iterdir(), key=lambda file: file.name)
    return [
        Option(file.name.removesuffix(".yaml"), _description(file))
        for file in files
        if file.name.endswith(".yaml") and not file.name.startswith("_")
    ]


def file_values(file: Traversable) -> dict[str, Any]:
    """Return the values of a configuration file, with its defaults list."""
    values = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _sections(group: str, option: str) -> list[Section]:
    if group == "batcher":
        common = _keys("_bounds", schema.BatcherConfig, group)
        policies = [option, *(name for name in PARAMETERS if name != option)]
        return [Section("", common), *(Section(name, _parameters(name)) for name in policies)]
    kind = schema.RewardConfig if group == "reward" else get_type_hints(schema.Config)[group]
    return [Section("", [*_keys(option, kind, group), *_nested_keys(kind, group)])]


def _keys(file: str, kind: type[Any], group: str = "") -> list[Key]:
    prefix = f"{group}." if group else ""
    return [
        Key(prefix + name, _type(kind, name), default, meaning)
        for name, (default, meaning) in _lines(conf() / group, file).items()
        if name in {field.name for field in fields(kind)}
    ]


def _nested_keys(kind: type[Any], group: str) -> list[Key]:
    """Return the keys of a group that ``config.yaml`` sets itself, because Hydra reserves their names in a group."""
    lines = iter((conf() / "config.yaml").read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line == f"{group}:":
            break
    indented = takewhile(lambda line: line.startswith("  "), lines)
    matches = map(_KEY.match, (line.removeprefix("  ") for line in indented))
    return [Key(f"{group}.{m[1]}", _type(kind, m[1]), m[2].strip(), m[3]) for m in matches if m]


def _lines(folder: Traversable, file: str) -> dict[str, tuple[str, str]]:
    """Return the default and the meaning of each key of a file and of the files that its defaults list names."""
    found: dict[str, tuple[str, str]] = {}
    path = folder / f"{file}.yaml"
    for name in _included(path):
        found |= _lines(folder, name)
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _KEY.match(line)
        if match and match[1] != "defaults":
            meaning = match[3] or (found[match[1]][1] if match[1] in found else "")
            found[match[1]] = (match[2].strip(), meaning)
    return found


def _included(file: Traversable) -> Iterator[str]:
    for name in file_values(file).get("defaults", []):
        if isinstance(name, str) and name != "_self_" and not name.startswith("schema"):
            yield name


def _description(file: Traversable) -> str:
    """Return the comment at the top of a file as one paragraph."""
    comment: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comment.append(line.removeprefix("#").strip())
    return " ".join(comment)


def _parameters(policy: str) -> list[Key]:
    """Return the keys of a policy from the dataclass of its parameters."""
    kind = PARAMETERS[policy]
    return [
        Key(
            name=f"batcher.{field.name}",
            type=_type(kind, field.name),
            default="null" if field.default is None else str(field.default),
            meaning=field.metadata["meaning"],
        )
        for field in fields(kind)
    ]


def _type(kind: type[Any], key: str) -> str:
    annotation = str(next(field.type for field in fields(kind) if field.name == key))
    return re.sub(r"list\[(\w+)\]", r"list of \1", annotation).replace(" | None", " or null")
