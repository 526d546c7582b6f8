"""The keys of a job's configuration, as overrides name them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass

from rollout.config.schema import Config
from rollout.errors import InputError


def unknown_key(key: str, known: Sequence[str]) -> InputError:
    """Return the error for a key that does not exist, naming the nearest one that does."""
    return InputError(f"There is no key {key}; the nearest is {nearest(key, known)}.")


def nearest(key: str, known: Sequence[str]) -> str:
    """Return the known key that ``key`` most likely means: the same last part first, then the closest spelling."""
    last_part = key.rsplit(".", 1)[-1]
    candidates = [k for k in known if k.rsplit(".", 1)[-1] == last_part] or known
    return difflib.get_close_matches(key, candidates, n=1, cutoff=0)[0]


def dotted_keys(config: Config) -> list[str]:
    """Return all keys that an override can name."""
    keys = []
    for group in fields(config):
        value = getattr(config, group.name)
        if is_dataclass(value):
            keys += [f"{group.name}.{field.name}" for field in fields(value)]
        else:
            keys.append(group.name)
    return keys
