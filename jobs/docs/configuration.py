"""Write docs/configuration.md: every configuration key with its type, its default and its meaning.

    python -m jobs.docs.configuration

Defaults and meanings are read from conf/, where each key has a comment, and types from the schema. Those of a
policy's own parameters are read from its dataclass in batcher/policies.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rollout.config.key_comments import Group, Key, Option, conf, file_values, groups, options, top_keys

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

_INTRO = """# Configuration

Every key of a job. This page is generated from `conf/` and `rollout/config/` by `make docs`; edit the comments there.

    python -m rollout [+experiment=NAME] [GROUP=OPTION ...] [GROUP.KEY=VALUE ...]

`GROUP=OPTION` selects a file in the group's folder of `conf/`, `GROUP.KEY=VALUE` overrides one key, and `--cfg job`
prints the composed values without running anything. An unknown key or a value out of range ends the job with status 2
before a model is loaded. `required` means that the key has no default. [cli.md](cli.md) says how values are quoted.
In the library, arguments of [`Engine` and `SamplingParams`](api.md) have the same names and defaults.
"""


def _table(keys: list[Key]) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        default = "required" if key.default == "???" else f"`{key.default}`"
        meaning = key.meaning.replace("|", "\\|")
        lines.append(f"| `{key.name}` | {key.type} | {default} | {meaning} |")
    return [*lines, ""]


def _options(group: str, offered: list[Option]) -> list[str]:
    lines = [f"| `{group}=` | |", "|---|---|"]
    lines += [f"| `{option.name}` | {option.description} |" for option in offered]
    return [*lines, ""]


def _group(group: Group) -> list[str]:
    lines = [f"## {group.name}", ""]
    if len(group.options) > 1:
        lines += _options(group.name, group.options)
    if len(group.sections) > 1:
        lines += ["All policies:", ""]
    for section in group.sections:
        lines += [f"`{group.name}={section.policy}`:", ""] if section.policy else []
        lines += _table(section.keys)
    return lines


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"`{prefix}{key}={str(value).lower() if isinstance(value, bool) else value}`"


def _experiments() -> list[str]:
    lines = ["| `+experiment=` | | sets |", "|---|---|---|"]
    for option in options("experiment"):
        values = file_values(conf() / "experiment" / f"{option.name}.yaml")
        chosen = [
            f"`{name.removeprefix('override /')}={selected}`"
            for default in values.pop("defaults")
            if isinstance(default, dict)
            for name, selected in default.items()
        ]
        lines.append(f"| `{option.name}` | {option.description} | {' '.join([*chosen, *_flat(values)])} |")
    return [*lines, ""]


def page() -> str:
    """Return the whole page."""
    lines = [_INTRO, "## Experiments", "", *_experiments()]
    for group in groups():
        lines += _group(group)
    lines += ["## tracker and seed", ""]
    for key in top_keys():
        lines += [f"`{key.name}` ({key.type}, default `{key.default}`): {key.meaning}", ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
