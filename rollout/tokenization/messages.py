"""Check chat messages, and give their content the form that a template takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from rollout.errors import PromptError, shorten
from rollout.tokenization.prompt import Message

ASSISTANT_ROLES = ("assistant", "model")
_MEDIA = ("image", "video", "audio", "file", "document")
#: Fields that a message may have instead of a content.
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning", "tool_responses")


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse messages that a template would render as something else, or as nothing.

    Raises:
        PromptError: a message has no role or no content, or holds other than text.
    """
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            _refuse(number, f"is {shorten(repr(message), 80)}, but must have a role and a content")
        content = message.get("content")
        if isinstance(content, str):
            continue
        if content is None:
            if not any(message.get(name) for name in _INSTEAD_OF_CONTENT):
                _refuse(number, f"({message['role']}) has no content")
        elif isinstance(content, list | tuple):
            for part in content:
                _check_part(number, part)
        elif message["role"] != "tool":
            _refuse(number, f"has a content of type {type(content).__name__}, but must have text or a list of parts")


def _check_part(number: int, part: object) -> None:
    if isinstance(part, str):
        return
    if not isinstance(part, Mapping):
        _refuse(number, f"has a part {shorten(repr(part), 80)}, which is neither text nor an object")
    kind = str(part.get("type", "text"))
    if any(media in kind for media in _MEDIA):
        _refuse(number, f"has a part of type {kind}, but prompts are text alone")


def _refuse(number: int, reason: str) -> NoReturn:
    raise PromptError("bad_prompt", f"Message {number} of the chat {reason}.")


def joined_parts(number: int, content: Sequence[Any]) -> str:
    """Return the text of content parts, for a template that takes strings.

    Raises:
        PromptError: a part has no text.
    """
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text")
        if not isinstance(text, str):
            _refuse(number, f"has the part {shorten(repr(part), 80)}, but the chat template takes text alone")
        texts.append(text)
    return "".join(texts)


def as_parts(content: str | Sequence[Any]) -> list[Mapping[str, Any]]:
    """Return a text, or parts of which some are plain strings, as content parts that all have a type."""
    parts = [content] if isinstance(content, str) else content
    return [{"type": "text", **(part if isinstance(part, Mapping) else {"text": part})} for part in parts]
