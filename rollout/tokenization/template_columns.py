"""Tools and template arguments of one prompt, which datasets store as objects or as JSON text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.errors import InputError, PromptError, shorten
from rollout.tokenization.prompt import Chat, Message

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that concern the chat template, as in TRL."""


def chat_of(messages: Sequence[Message], row: Mapping[str, Any]) -> Chat:
    """Return the chat of a row's messages, with the tools and template arguments that its columns have.

    Raises:
        PromptError: a column holds something else.
    """
    tools, arguments = (row.get(name) for name in TEMPLATE_COLUMNS)
    try:
        return Chat(
            messages,
            tools=None if tools is None else _as_tools(tools),
            chat_template_kwargs=None if arguments is None else _as_arguments(arguments),
        )
    except ValueError as error:
        raise PromptError("bad_prompt", f"A column for the chat template cannot be used: {error}.") from error


def read_tools(path: str) -> Sequence[Mapping[str, Any]]:
    """Read a file of tool schemas: a JSON list.

    Raises:
        InputError: the file cannot be read, or holds something else; the message begins with ``tools``.
    """
    try:
        return _as_tools(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"tools={path} cannot be read ({error.strerror}): give a JSON file.") from error
    except ValueError as error:
        raise InputError(f"tools={path} holds no list of tool schemas: {error}.") from error


def _as_tools(value: object) -> Sequence[Mapping[str, Any]]:
    value = _parsed("tools", value)
    if isinstance(value, Sequence):
        tools = [tool if callable(tool) else _parsed("tools", tool) for tool in value]
        if all(isinstance(tool, Mapping) or callable(tool) for tool in tools):
            return tools
    raise ValueError(f"tools is {shorten(repr(value), 60)}, but must be a list of JSON schemas")


def _as_arguments(value: object) -> Mapping[str, Any]:
    value = _parsed("chat_template_kwargs", value)
    if isinstance(value, Mapping):
        return value
    raise ValueError(f"chat_template_kwargs is {shorten(repr(value), 60)}, but must be an object of names and values")


def _parsed(name: str, value: object) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{name} is {shorten(repr(value), 60)}, which is not JSON") from error
