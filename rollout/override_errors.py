"""Explain a bad override in one sentence; Hydra's own messages take several and suggest no key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from rollout.config.compose import CONFIG_MODULE, load_config
from rollout.config.keys import dotted_keys, unknown_key
from rollout.errors import InputError
from rollout.models.errors import first_line


def explain(overrides: Sequence[str], error: HydraException | OmegaConfBaseException) -> str:
    """Return one sentence that names the override at fault and what to write instead."""
    if isinstance(error, OverrideParseException):
        return f"The override {error.override} cannot be read ({first_line(error)}); write KEY=VALUE."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        return _no_such_option(error.missing_cfg_file, error.options)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return _missing_plus(parsed) or _unknown_key(parsed) or _hydra_message(error)


def _missing_plus(overrides: Sequence[Override]) -> str | None:
    """Return a hint for a key that exists only once it is added with ``+``."""
    for override in overrides:
        if override.is_add():
            continue
        key = override.key_or_group
        if key == "experiment":
            return f"An experiment is added to the defaults: write +experiment={override.value()}."
        if key.startswith("reward.") and key != "reward._target_":
            return f"An argument of the reward is added to its configuration: write +{override.input_line}."
    return None


def _unknown_key(overrides: Sequence[Override]) -> str | None:
    groups = config_groups()
    chosen = [override.input_line or "" for override in overrides if override.key_or_group in groups]
    try:
        # The keys depend on the chosen options: only batcher=sla and batcher=paper have batcher.alpha.
        config = load_config([*chosen, "output.dir=.", "data.path=."])
    except (HydraException, InputError):
        return None
    keys = dotted_keys(config)
    for override in overrides:
        key = override.key_or_group
        if key in keys or key in groups or key.split(".")[0] in ("hydra", "reward", "experiment"):
            continue
        return str(unknown_key(key, [*keys, *groups]))
    return None


def _no_such_option(file: str, options: Sequence[str]) -> str:
    group, _, name = file.rpartition("/")
    # Schemas and files included by options are in the folder too, but cannot be chosen.
    offered = sorted(option for option in options if not option.startswith(("_", "schema")))
    near = difflib.get_close_matches(name, offered, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}" if near else ""
    return f"There is no {group}={name}{hint}; {group} is one of {', '.join(offered)}."


def _hydra_message(error: BaseException) -> str:
    """Return the first line of Hydra's message and of its cause, which names the key and the bad value."""
    lines = [first_line(error)]
    if error.__cause__:
        lines.append(first_line(error.__cause__))
    return ": ".join(lines) + "."


def config_groups() -> list[str]:
    """Return the groups that an override can choose an option of."""
    return sorted(folder.name for folder in resources.files(CONFIG_MODULE).iterdir() if _is_group(folder.name))


def _is_group(name: str) -> bool:
    return name not in ("hydra", "__pycache__") and "." not in name
