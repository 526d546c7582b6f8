"""The kinds of prompt, and what becomes of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Message = Mapping[str, Any]
Tool = Mapping[str, Any] | Callable[..., Any]
"""A JSON schema, or a function with type hints and a docstring that describes its arguments."""
AddSpecialTokens = bool | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Chat:
    """Chat messages, with the tools and the template arguments of this prompt alone.

    Args:
        messages: dicts with a role and a content. If the last one is the assistant's, completions continue it.
        tools: JSON schemas or functions for the template; None: the engine's.
        chat_template_kwargs: further variables of the template; they take the place of the engine's of the same name.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


Prompt = str | Chat | Sequence[Message] | Sequence[int]
"""A text, chat messages with or without their own tools, or token ids."""


@dataclass(frozen=True, slots=True)
class EncodingOptions:
    """How prompts are encoded, the same for all prompts of an engine.

    Args:
        chat_template: a Jinja template, the file that holds one, or the name of one of the tokenizer's templates; None:
            the tokenizer's default.
        chat_template_kwargs: further variables of the template.
        tools: for chats that have none of their own.
        add_special_tokens: True: add what the tokenizer adds, to texts and to rendered chats; False: add nothing;
            ``auto``: add to texts what the tokenizer puts before them, unless a text begins with it.
    """

    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Tool] | None = None
    add_special_tokens: AddSpecialTokens = "auto"


class EncodedPrompt(NamedTuple):
    """A prompt as the engine takes it."""

    token_ids: list[int]
    turn_end_ids: tuple[int, ...] = ()
    """Ids that end the assistant's turn, if the prompt is a chat."""
