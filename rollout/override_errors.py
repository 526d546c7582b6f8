"""What is wrong with an override, in one sentence: Hydra's own messages are several, and name no near key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from rollout.config import CONFIG_MODULE, dotted_keys, load_config, nearest
from rollout.errors import InputError


def explain(overrides: Sequence[str], error: HydraException | OmegaConfBaseException) -> str:
    """One sentence that names the override at fault and what to write instead."""
    if isinstance(error, OverrideParseException):
        return f"The override {error.override} cannot be read ({_first_line(error)}); write KEY=VALUE."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        return _no_such_option(error.missing_cfg_file, error.options)
    return _unknown_key(OverridesParser.create().parse_overrides(list(overrides))) or _of_hydra(error)


def _unknown_key(overrides: Sequence[Override]) -> str | None:
    groups = config_groups()
    for override in overrides:
        if override.key_or_group == "experiment" and not override.is_add():
            return f"An experiment is added to the defaults: write +experiment={override.value()}."
        if (
            override.key_or_group.startswith("reward.")
            and override.key_or_group != "reward._target_"
            and not override.is_add()
        ):
            return f"An argument of the reward is added to its configuration: write +{override.input_line}."
    chosen = [o.input_line or "" for o in overrides if o.key_or_group in groups]
    try:
        # The keys depend on the groups chosen: batcher.alpha is one of batcher=sla alone.
        config = load_config([*chosen, "output.dir=.", "data.path=."])
    except (HydraException, InputError):
        return None
    keys = dotted_keys(config)
    for override in overrides:
        key = override.key_or_group
        if key in keys or key in groups or key.split(".")[0] in ("hydra", "reward", "experiment"):
            continue
        return f"There is no key {key}; the nearest is {nearest(key, [*keys, *groups])}."
    return None


def _no_such_option(file: str, options: Sequence[str]) -> str:
    group, _, name = file.rpartition("/")
    # Schemas and shared pieces are files of the group too, but nothing that one chooses.
    offered = sorted(o for o in options if not o.startswith(("_", "schema")))
    near = difflib.get_close_matches(name, offered, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}" if near else ""
    return f"There is no {group}={name}{hint}; {group} is one of {', '.join(offered)}."


def _of_hydra(error: BaseException) -> str:
    """Hydra's own words, with those of the cause that names the key and the wrong value."""
    said = [_first_line(error)] + ([_first_line(error.__cause__)] if error.__cause__ else [])
    return ": ".join(said) + "."


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)


def config_groups() -> list[str]:
    """The groups that an override can choose an option of."""
    return sorted(folder.name for folder in resources.files(CONFIG_MODULE).iterdir() if _is_group(folder.name))


def _is_group(name: str) -> bool:
    return name not in ("hydra", "__pycache__") and "." not in name
