"""Write a text so that the shell and Hydra's grammar both leave it as it is."""

from __future__ import annotations

import re
import shlex
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

#: What OmegaConf replaces by the value of a key or of a resolver.
_INTERPOLATION = re.compile(r"\$\{[\w.]+(?::[^{}]*)?\}")
_TYPOGRAPHIC = {"“": "”", "‘": "’", "„": "“", "«": "»"}
_ANSI_C = {"\n": r"\n", "\t": r"\t", "\\": r"\\", "'": r"\'"}
_SAFE_IN_SHELL = re.compile(r"[\w@%+=:,./~-]+", re.ASCII)


def literal(text: str, *, interpolations: bool = True) -> str:
    """Quote ``text`` for Hydra, so that an override's value is exactly it.

    Args:
        text: the value to be.
        interpolations: leave ``${key}`` and ``${oc.env:NAME}`` what they are.
    """
    quote = Quote.single if '"' in text and "'" not in text else Quote.double
    if "${" in (_INTERPOLATION.sub("", text) if interpolations else text):
        # A backslash before `${` makes it text; backslashes that stand there already are doubled first.
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(text, quote).with_quotes()


def shell_word(word: str) -> str:
    """Quote a command-line argument for a POSIX shell, in the form that reads best."""
    if _SAFE_IN_SHELL.fullmatch(word):
        return word
    if "\n" in word or "\t" in word:
        # A message is one line, so these are written as bash, zsh and ksh read them.
        return "$'" + "".join(_ANSI_C.get(character, character) for character in word) + "'"
    single = shlex.quote(word)
    if "'" not in word or re.search(r"[$`!\\]", word):
        return single
    double = '"' + word.replace('"', '\\"') + '"'
    return min(single, double, key=len)


def suggest(key: str, text: str, kind: str = "str") -> str:
    """Return the argument to type in a shell for ``key`` to get the value that ``text`` was meant to be.

    Args:
        key: with its prefix (``+``), where it needs one.
        text: what stands behind ``=``.
        kind: the type of the key, in the words of `rollout.config.key_comments`.
    """
    if kind.startswith("list of") or (kind == "Any" and text.lstrip().startswith("[")):
        items = [_item(item) for item in _items(text)] if text.strip() else [literal(text)]
        return shell_word(f"{key}=[{','.join(items)}]")
    if kind.startswith(("dict", "Any")) and (value := _mapping(text)) is not None:
        return shell_word(f"{key}={_written(value)}")
    if kind.startswith(("int", "float", "bool")) or _reads_as(key, text):
        return shell_word(f"{key}={text}")
    if len(text) > 1 and _TYPOGRAPHIC.get(text[0]) == text[-1]:
        text = text[1:-1]
    return shell_word(f"{key}={literal(text)}")


def interpolations(text: str) -> list[str]:
    """Return what stands inside each ``${…}`` of a text."""
    return [match[0][2:-1] for match in _INTERPOLATION.finditer(text) if text[: match.start()][-1:] != "\\"]


def _reads_as(key: str, text: str) -> bool:
    """Return whether Hydra reads an unquoted text as it stands."""
    try:
        return bool(OverridesParser.create().parse_override(f"{key}={text}").value() == text)
    except HydraException:
        return False


def parses(argument: str) -> bool:
    """Return whether Hydra can read an override."""
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def _items(text: str) -> list[str]:
    """Split ``[a, "b, c"]`` at its commas; a text without brackets is one item."""
    text = text.strip()
    if not text.startswith("["):
        return [text]
    items, quote = [""], ""
    for character in text.removeprefix("[").removesuffix("]"):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and not items[-1].strip():
            quote = character
        elif character == ",":
            items.append("")
            continue
        items[-1] += character
    return [item.strip() for item in items if item.strip()]


def _item(item: str) -> str:
    """Return an item of a list as it is where Hydra reads it so, and quoted elsewhere."""
    try:
        value = OverridesParser.create().parse_override(f"key={item}").value()
    except HydraException:
        return literal(item)
    quoted = item[:1] in "\"'" and item[-1:] == item[:1] and len(item) > 1
    return item if quoted or str(value) == item else literal(item)


def _mapping(text: str) -> dict[Any, Any] | None:
    """Read a dictionary as JSON or YAML writes it."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return value if isinstance(value, dict) else None


def _written(value: Any) -> str:
    """Write a value in Hydra's grammar, whose dictionaries have unquoted keys."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_written(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z_][\w.-]*", value, re.ASCII) and not _is_word(value) else literal(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _is_word(text: str) -> bool:
    """Return whether Hydra takes an unquoted text for something else."""
    return text.lower() in ("true", "false", "null", "nan", "inf")
