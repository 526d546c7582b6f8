"""Arguments of tool calls, which datasets store as JSON text or as objects, in the form that a template takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from rollout.errors import PromptError, shorten
from rollout.tokenization.prompt import Message

PROBE = "rolloutargument"
"""The name of the argument in `probe_calls`."""
_OBJECT = {PROBE: 1}
_TEXT = json.dumps(_OBJECT)


def probe_calls(as_text: bool) -> list[Mapping[str, Any]]:
    """Return one tool call, for a trial of a template."""
    function = {"name": "probe", "arguments": _TEXT if as_text else _OBJECT}
    return [{"type": "function", "id": "rollout00", "function": function}]


def are_written(rendered: str, as_text: bool) -> bool:
    """Return whether a rendered chat has the arguments of `probe_calls`, and not as a quoted or a Python value."""
    return _TEXT in rendered if as_text else PROBE in rendered and f"'{PROBE}': 1" not in rendered


def with_object_arguments(number: int, message: Message) -> Message:
    """Return the message with the arguments of its tool calls as objects.

    Raises:
        PromptError: the arguments of a call are text that holds no JSON object.
    """

    def parsed(arguments: Any) -> Any:
        if not isinstance(arguments, str):
            return arguments
        try:
            value = json.loads(arguments or "{}")
        except ValueError:
            value = None
        if not isinstance(value, Mapping):
            raise PromptError(
                "bad_prompt",
                f"Message {number} of the chat has a tool call whose arguments are {shorten(repr(arguments), 80)}, "
                "which is no JSON object.",
            )
        return value

    return _with_arguments(message, parsed)


def with_text_arguments(message: Message) -> Message:
    """Return the message with the arguments of its tool calls as JSON text."""
    return _with_arguments(message, lambda given: given if isinstance(given, str) else json.dumps(given))


def _with_arguments(message: Message, convert: Callable[[Any], Any]) -> Message:
    calls = message["tool_calls"]
    if not isinstance(calls, list | tuple):
        return message
    return {**message, "tool_calls": [_converted(call, convert) for call in calls]}


def _converted(call: Any, convert: Callable[[Any], Any]) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _converted(call["function"], convert)}
    return {**call, "arguments": convert(call["arguments"])} if "arguments" in call else call
