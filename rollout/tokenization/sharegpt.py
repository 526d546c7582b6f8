"""Read chats in ShareGPT's form, whose messages have ``from`` and ``value`` instead of a role and a content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_ROLES |= {"observation": "tool", "function_response": "tool"}
_ROLES |= {role: role for role in ("user", "assistant", "model", "system", "developer", "tool")}


def is_sharegpt(items: Sequence[Any]) -> bool:
    """Return whether all items are messages in ShareGPT's form."""
    return bool(items) and all(
        isinstance(item, dict) and isinstance(item.get("from"), str) and "value" in item and not item.get("role")
        for item in items
    )


def as_messages(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with roles and contents.

    Raises:
        ValueError: a message is from somebody who has no role; the message says so.
    """
    messages = []
    for item in items:
        others = {name: value for name, value in item.items() if name not in ("from", "value", "role", "content")}
        if (role := _ROLES.get(item["from"].lower())) is None:
            raise ValueError(f"from is {item['from']!r}, which is none of {', '.join(_ROLES)}")
        messages.append({"role": role, "content": item["value"], **others})
    return messages
