"""The text of a record's prompt, from the input columns that stand in the output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rollout.records import record_columns

_OWN = frozenset(record_columns(split_reasoning=True, reference=True))
"""Columns that are no input columns."""
_LONGEST_FACT = 200


def prompt_text(record: Mapping[str, Any], prompt_column: str) -> str:
    """Return the prompt's text, or how many tokens it has if the output does not hold its column.

    Args:
        prompt_column: ``data.prompt_column``; dots lead into nested columns.
    """
    name, *path = prompt_column.split(".") if prompt_column not in record else [prompt_column]
    value = record.get(f"input_{name}", None if name in _OWN else record.get(name))
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None:
        return f"({len(record.get('prompt_ids') or ())} tokens; the text is not in the output)"
    return as_text(value)


def other_columns(record: Mapping[str, Any], prompt_column: str) -> dict[str, str]:
    """Return the short input columns besides the prompt, such as a reference answer."""
    prompt = prompt_column.partition(".")[0]
    skipped = _OWN | {prompt, prompt_column, f"input_{prompt}"}
    texts = {name: as_text(value) for name, value in record.items() if name not in skipped and value is not None}
    return {name: text for name, text in texts.items() if len(text) <= _LONGEST_FACT}


def as_text(value: Any) -> str:
    """Write a value of the input for a reader: chat messages one after another, token ids as their number."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
        return "\n\n".join(f"{message['role']}: {_content(message)}" for message in value)
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return f"({len(value)} token ids)"
    return json.dumps(value, ensure_ascii=False, default=str)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(part.get("text") or part) if isinstance(part, dict) else str(part) for part in content)
    rest = {name: value for name, value in message.items() if name != "role" and value is not None}
    return json.dumps(rest, ensure_ascii=False, default=str)
