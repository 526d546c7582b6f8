"""Write docs/configuration.md: every configuration key with its type, its default and its meaning.

    python -m jobs.docs.configuration

Defaults and meanings are read from conf/, where each key has a comment, and types from the schema. Those of a
policy's own parameters are read from its dataclass in batcher/policies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rollout.batcher.registry import PARAMETERS
from rollout.config import schema

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "configuration.md"
CONF = ROOT / "conf"

#: Each group: the option whose keys are listed, and their types.
GROUPS: dict[str, tuple[str, type[Any]]] = {
    "model": ("default", schema.ModelConfig),
    "data": ("arithmetic", schema.DataConfig),
    "sampling": ("default", schema.SamplingConfig),
    "batcher": ("predictive", schema.BatcherConfig),
    "memory": ("default", schema.MemoryConfig),
    "output": ("default", schema.OutputConfig),
    "reward": ("none", schema.RewardConfig),
}
_KEY = re.compile(r"^(\w+): ([^#]*?)(?: # (.*))?$")

_INTRO = """# Configuration

Every key of a job. This page is generated from `conf/` and `rollout/config/` by `make docs`; edit the comments there.

    python -m rollout [+experiment=NAME] [GROUP=OPTION ...] [GROUP.KEY=VALUE ...]

`GROUP=OPTION` selects a file in the group's folder of `conf/`, `GROUP.KEY=VALUE` overrides one key, and `--cfg job`
prints the composed values without running anything. An unknown key or a value out of range ends the job with status 2
before a model is loaded. `required` means that the key has no default. In the library, arguments of
[`Engine` and `SamplingParams`](api.md) have the same names and defaults.
"""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a configuration file."""

    name: str
    default: str
    meaning: str


def keys_of(path: Path) -> list[Key]:
    """Return the keys of a file and of the files of its folder that its defaults list names."""
    keys: dict[str, Key] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for name in _included(path):
        keys |= {key.name: key for key in keys_of(path.with_name(f"{name}.yaml"))}
    for line in lines:
        match = _KEY.match(line)
        if match and match[1] != "defaults":
            meaning = match[3] or (keys[match[1]].meaning if match[1] in keys else "")
            keys[match[1]] = Key(match[1], match[2].strip(), meaning)
    return list(keys.values())


def _values(path: Path) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _included(path: Path) -> Iterator[str]:
    for name in _values(path).get("defaults", []):
        if isinstance(name, str) and name != "_self_" and not name.startswith("schema"):
            yield name


def _description(path: Path) -> str:
    """Return the comment at the top of a file as one paragraph."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comment.append(line.removeprefix("#").strip())
    return " ".join(comment)


def _type(kind: type[Any], key: str) -> str:
    annotation = str(next(field.type for field in fields(kind) if field.name == key))
    return re.sub(r"list\[(\w+)\]", r"list of \1", annotation).replace(" | None", " or null")


def _table(group: str, keys: list[Key], kind: type[Any]) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        default = "required" if key.default == "???" else f"`{key.default}`"
        meaning = key.meaning.replace("|", "\\|")
        lines.append(f"| `{group}.{key.name}` | {_type(kind, key.name)} | {default} | {meaning} |")
    return [*lines, ""]


def _options(group: str) -> list[str]:
    lines = [f"| `{group}=` | |", "|---|---|"]
    for path in sorted((CONF / group).glob("[!_]*.yaml")):
        lines.append(f"| `{path.stem}` | {_description(path)} |")
    return [*lines, ""]


def _batcher() -> list[str]:
    lines = ["All policies:", "", *_table("batcher", keys_of(CONF / "batcher" / "_bounds.yaml"), schema.BatcherConfig)]
    for name in ("predictive", "memory", "sla", "paper"):
        lines += [f"`batcher={name}`:", "", *_table("batcher", parameter_keys(PARAMETERS[name]), PARAMETERS[name])]
    return lines


def parameter_keys(parameters: type[Any]) -> list[Key]:
    """Return the keys of a policy from the dataclass of its parameters."""
    return [
        Key(field.name, "null" if field.default is None else str(field.default), field.metadata["meaning"])
        for field in fields(parameters)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"`{prefix}{key}={str(value).lower() if isinstance(value, bool) else value}`"


def _experiments() -> list[str]:
    lines = ["| `+experiment=` | | sets |", "|---|---|---|"]
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        values = _values(path)
        chosen = [
            f"`{name.removeprefix('override /')}={option}`"
            for default in values.pop("defaults")
            if isinstance(default, dict)
            for name, option in default.items()
        ]
        lines.append(f"| `{path.stem}` | {_description(path)} | {' '.join([*chosen, *_flat(values)])} |")
    return [*lines, ""]


def page() -> str:
    """Return the whole page."""
    lines = [_INTRO, "## Experiments", "", *_experiments()]
    for group, (option, kind) in GROUPS.items():
        lines += [f"## {group}", ""]
        if len(list((CONF / group).glob("[!_]*.yaml"))) > 1:
            lines += _options(group)
        lines += _batcher() if group == "batcher" else _table(group, keys_of(CONF / group / f"{option}.yaml"), kind)
    top = [key for key in keys_of(CONF / "config.yaml") if key.name in {field.name for field in fields(schema.Config)}]
    lines += ["## seed", ""]
    for key in top:
        lines += [f"`{key.name}` ({_type(schema.Config, key.name)}, default `{key.default}`): {key.meaning}", ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
