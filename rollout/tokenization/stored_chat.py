"""Recognise chat messages that a dataset stores as text: as JSON, or as Python writes lists."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from rollout.tokenization.sharegpt import is_sharegpt

_BEGINNING = re.compile(r"\s*(\[\s*)?\{")
_OF_MESSAGES = re.compile(r"""\s*(\[\s*)?\{\s*['"](role|content|messages)['"]\s*:""")


def stored_messages(text: str) -> list[dict[str, Any]] | None:
    """Return the messages that a text stores, perhaps in ShareGPT's form; None if it is another text.

    Raises:
        ValueError: it begins as messages do, but cannot be read as such; the message says why.
    """
    if not _BEGINNING.match(text):
        return None
    looks_so = _OF_MESSAGES.match(text) is not None
    try:
        value = json.loads(text)
    except ValueError as error:
        if not looks_so:
            return None
        value = _python_value(text, error)
    items = [value] if isinstance(value, dict) else value
    if is_sharegpt(items):
        return list(items)
    with_role = [isinstance(item, dict) and isinstance(item.get("role"), str) for item in items]
    if all(with_role):
        return list(items)
    if any(with_role) or looks_so:
        raise ValueError("not every item is an object with a role")
    return None


def _python_value(text: str, json_error: ValueError) -> Any:
    """Read a list as Python writes it, with single quotes, which ``to_csv`` of a table leaves in a file."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{json_error}") from None
