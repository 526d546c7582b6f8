"""The keys of a job's configuration, as overrides name them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass

from rollout.batcher.suggestions import near_name
from rollout.config.schema import Config
from rollout.errors import InputError


def unknown_key(key: str, known: Sequence[str]) -> InputError:
    """Return the error for a key that does not exist, naming the nearest one, or else where keys are listed."""
    near = nearest(key, known)
    if near:
        return InputError(f"There is no key {key}; the nearest is {near}.")
    group = key.split(".")[0]
    own = [k.removeprefix(f"{group}.") for k in known if k.startswith(f"{group}.")]
    if own and key != group:
        return InputError(f"There is no key {key}; the keys of {group} are {', '.join(own)}.")
    return InputError(f"There is no key {key}; `python -m rollout --help` lists all keys.")


def nearest(key: str, known: Iterable[str]) -> str | None:
    """Return the known key that ``key`` most likely means, or None if none is near.

    Its last part must be near; among keys with the same last part, the one whose group is spelled most alike.
    """
    known = list(known)
    if same := next((k for k in known if _plain(k) == _plain(key)), None):
        # Another case, or the group and the name run together, as in sampling_n.
        return same
    group, _, last = key.replace("/", ".").rpartition(".")
    parts = {k.rpartition(".")[2] for k in known}
    own = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == group]
    part = next((name for names in (own, parts) if (name := near_name(last, names))), None)
    if part is None:
        return None
    candidates = [k for k in known if k.rpartition(".")[2] == part]
    return max(candidates, key=lambda k: difflib.SequenceMatcher(None, group, k.rpartition(".")[0]).ratio())


def _plain(key: str) -> str:
    return "".join(character for character in key.lower() if character.isalnum())


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
