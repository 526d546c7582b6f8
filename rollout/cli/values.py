"""Check the value of one key against its type, in a user's words."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from omegaconf import BooleanNode, FloatNode, IntegerNode, StringNode
from omegaconf.errors import OmegaConfBaseException

from rollout.cli.quoting import shell_word, suggest
from rollout.config.key_comments import Key
from rollout.errors import InputError, shorten

_NODES: dict[str, Callable[[Any], object]] = {
    "int": IntegerNode,
    "float": FloatNode,
    "bool": BooleanNode,
    "str": StringNode,
}
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list of str": "a list of texts",
    "list of int": "a list of whole numbers",
}


def check_value(key: Key, value: Any, text: str) -> None:
    """Refuse a value that the type of the key does not allow; interpolations are checked when they are resolved.

    Args:
        value: as Hydra's grammar reads it.
        text: as it was written.

    Raises:
        InputError: the value is of another type.
    """
    kind, nullable = key.type.removesuffix(" or null"), key.type.endswith(" or null")
    if kind not in _WORDS or (isinstance(value, str) and "${" in value) or (value is None and nullable):
        return
    if kind == "str" and nullable and text in ("None", "none", "nil"):
        shown = shell_word(f'{key.name}="{text}"')
        raise InputError(f"{key.name} is {text}: write {key.name}=null for no value, or {shown} for the word.")
    wrong = InputError(describe_wrong_type(key, value, text))
    if kind.startswith("list of "):
        if not isinstance(value, list) or not all(_fits(kind.removeprefix("list of "), item) for item in value):
            raise wrong
    elif not _fits(kind, value):
        raise wrong


def describe_wrong_type(key: Key, value: object, text: str | None) -> str:
    """Return the sentence for a value of another type than the key's; ``text`` is None where it is not known."""
    kind = key.type.removesuffix(" or null")
    wanted = "a dictionary {name: value}" if kind.startswith("dict") else _WORDS.get(kind, kind)
    wanted += " or null" if key.type.endswith(" or null") else ""
    if text is None:
        return f"{key.name} must be {wanted} ({key.meaning})."
    shown = text if re.fullmatch(r"[\w.+%-]+", text) else "empty" if text == "" else repr(shorten(text, 60))
    sentence = f"{key.name} is {shown}, but must be {wanted}"
    if isinstance(value, float) and kind == "int" and math.isfinite(value) and value == int(value):
        return f"{sentence}: write {key.name}={int(value)}."
    if kind == "str" and isinstance(value, list | dict):
        return f"{sentence}: write {suggest(key.name, text)} for the text itself."
    if kind == "list of str" and isinstance(value, list):
        return f"{sentence}: write {suggest(key.name, text, kind)}."
    if key.type.endswith(" or null") and text.lower() in ("none", "nil", "~"):
        return f"{sentence}: write {key.name}=null."
    if text in ("", "null", "None"):
        instead = f"{key.name}=[]" if kind.startswith("list") else _example(key)
        return f"{sentence}: {f'write {instead}' if instead else 'give one'}, or leave it out."
    return f"{sentence} ({key.meaning})."


def _example(key: Key) -> str:
    return "" if key.default in ("???", "null") else f"{key.name}={key.default}"


def _fits(kind: str, value: Any) -> bool:
    if kind == "str" and (value is None or isinstance(value, float | bool)):
        # An unquoted text that looks like a number or a word of YAML's, whose spelling would change.
        return False
    if kind == "bool" and isinstance(value, int | float) and not isinstance(value, bool):
        return value in (0, 1)
    if isinstance(value, str) and kind in ("int", "float") and re.search(r"\s", value):
        return False
    if value is None or (kind == "int" and isinstance(value, bool)) or (kind == "float" and isinstance(value, bool)):
        return False
    try:
        _NODES[kind](value)
    except OmegaConfBaseException:
        return False
    return True
