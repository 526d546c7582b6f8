"""Compose the configuration with Hydra, and validate it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Sequence

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from rollout.config.checks import config_checks
from rollout.config.escapes import understood_stops
from rollout.config.key_comments import CONFIG_MODULE
from rollout.config.keys import dotted_keys, unknown_key
from rollout.config.schema import (
    BATCHER_SCHEMAS,
    Config,
    DataConfig,
    JobConfig,
    MemoryConfig,
    ModelConfig,
    OutputConfig,
    RewardConfig,
)
from rollout.errors import InputError, check_all

CONFIG_NAME = "config"
VERSION_BASE = "1.3"

_PATHS = (
    ("model", "path"),
    ("model", "adapter"),
    ("model", "reference"),
    ("data", "path"),
    ("data", "lengths_from"),
    ("data", "chat_template"),
    ("data", "tools"),
    ("output", "dir"),
)
_EXAMPLES = {"output.dir": "runs/my_run", "data.path": "prompts.jsonl", "model.path": "org/model"}


def register() -> None:
    """Register the schemas with Hydra; the YAML files name them in their defaults lists."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, name, node in (
        ("model", "schema", ModelConfig),
        ("data", "schema", DataConfig),
        *(("batcher", f"schema_{policy}", schema) for policy, schema in BATCHER_SCHEMAS.items()),
        ("memory", "schema", MemoryConfig),
        ("output", "schema", OutputConfig),
        ("reward", "schema", RewardConfig),
        ("job", "schema", JobConfig),
    ):
        store.store(group=group, name=name, node=node)


def load_config(overrides: Sequence[str] = ()) -> Config:
    """Return the validated configuration that ``python -m rollout OVERRIDES`` would run with."""
    register()
    with initialize_config_module(CONFIG_MODULE, version_base=VERSION_BASE, job_name="rollout"):
        return validate(compose(CONFIG_NAME, list(overrides)))


def validate(composed: DictConfig) -> Config:
    """Convert the composed configuration into a `Config` whose values are all in range.

    Raises:
        InputError: a key is unknown, a required key has no value, or a value is out of range.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        keys = " and ".join(missing)
        raise InputError(f"{keys} must be given, e.g. {missing[0]}={_EXAMPLES.get(missing[0], 'VALUE')}.")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    reward = OmegaConf.to_container(composed.reward, resolve=True)
    if isinstance(reward, dict) and not reward.get("_target_"):
        # Arguments of no function would be dropped.
        arguments = [str(name) for name, value in reward.items() if not str(name).startswith("_") or value == ""]
        if arguments:
            shown = f"reward.{arguments[0]}"
            raise InputError(f"{shown} needs a function: write reward._target_=MODULE.FUNCTION, or leave it out.")
    config.reward = reward if isinstance(reward, dict) and reward.get("_target_") else None
    _refuse_unknown_keys(composed, config)
    _expand_home(config)
    config.sampling.stop = understood_stops(config.sampling.stop)
    config.sampling.params()
    config.batcher.policy()
    check_all(config_checks(config))
    return config


def given_parameters(overrides: Iterable[str]) -> set[str]:
    """Return the sampling parameters that overrides name, whether or not they change the value."""
    matches = (re.match(r"\+{0,2}sampling\.(\w+)", override) for override in overrides)
    return {match[1] for match in matches if match}


def _expand_home(config: Config) -> None:
    """Expand ``~`` in the paths of a file; on a command line the shell does it for most of them."""
    for group, name in _PATHS:
        value = getattr(getattr(config, group), name)
        if isinstance(value, str) and value.startswith("~"):
            setattr(getattr(config, group), name, os.path.expanduser(value))


def with_examples(composed: DictConfig) -> DictConfig:
    """Return a copy with an example for each key that must be given and is not."""
    filled = copy.deepcopy(composed)
    for key in OmegaConf.missing_keys(filled):
        OmegaConf.update(filled, key, _EXAMPLES.get(key, "VALUE"))
    return filled


def _refuse_unknown_keys(composed: DictConfig, config: Config) -> None:
    """Refuse keys that ``+group.key=value`` added but no dataclass declares; Hydra accepts them."""
    known = dotted_keys(config)
    for group, node in composed.items():
        if group == "reward":
            # Its keys are the arguments of the user's function.
            continue
        present = [f"{group!s}.{key!s}" for key in node] if isinstance(node, DictConfig) else [str(group)]
        for key in present:
            if key not in known:
                raise unknown_key(key, known)
