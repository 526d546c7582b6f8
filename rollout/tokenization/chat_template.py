"""Render chats by the tokenizer's chat template, or by the user's."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from rollout.errors import InputError, PromptError, shorten
from rollout.tokenization.messages import ASSISTANT_ROLES, as_parts, check_messages, joined_parts
from rollout.tokenization.prompt import Chat, EncodingOptions, Message, Tool
from rollout.tokenization.template_source import dates_of, parse, pinned, read_template, variables
from rollout.tokenization.tool_calls import are_written, probe_calls, with_object_arguments, with_text_arguments

logger = logging.getLogger(__name__)

#: Argument of `apply_chat_template` that templates see as a variable.
_DOCUMENTS = "documents"
_PROBE = "rolloutprobe"
_PRINTED_PARTS = re.compile(rf"""['"]text['"]\s*:\s*['"]{_PROBE}""")


class ChatTemplate:
    """Renders chats with transformers' `apply_chat_template`.

    A chat that ends with an assistant's message is left open, so that the model continues the message.

    Args:
        tokenizer: has the template, its named templates, and the special tokens that templates write.
        options: the template, and the tools and variables of chats that have none of their own.
        dates: what a template's clock gives, by format; None: what it gives now.

    Raises:
        InputError: the template cannot be read or parsed, or the variables have names that are not free.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, options: EncodingOptions, dates: Mapping[str, str] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._named: dict[str, str] = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        self._template = options.chat_template
        if self._template is not None and self._template not in self._named:
            self._template = read_template(self._template)
        sources = [self._named.get(self._template, self._template)] if self._template else [*self._named.values()]
        if not sources and isinstance(tokenizer.chat_template, str):
            sources = [tokenizer.chat_template]
        for source in sources:
            parse(source)
        self.exists = bool(sources)
        now = datetime.now()  # as transformers' templates do
        found = {form: date for source in sources for form, date in dates_of(source, now).items()}
        self.dates: Mapping[str, str] = found if dates is None else dates
        """What the template's clock gives, by format; empty if the template has no clock."""
        self._tools = options.tools
        self._variables = dict(options.chat_template_kwargs)
        self._reserved = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {_DOCUMENTS, "kwargs"}
        if taken := self._variables.keys() & self._reserved:
            raise InputError(_taken(taken))
        self._accepted: dict[tuple[str, str, bool], bool] = {}
        self._accepted_arguments: dict[tuple[str, bool], bool] = {}
        self._warned: set[str] = set()

    def render(self, chat: Chat) -> str:
        """Return the text of a chat, up to where the model goes on.

        Raises:
            PromptError: the template refuses the chat, or the chat is no list of messages.
        """
        check_messages(chat.messages)
        tools = list(self._tools or () if chat.tools is None else chat.tools) or None
        variables_of_chat = {**self._variables, **(chat.chat_template_kwargs or {})}
        if taken := variables_of_chat.keys() & self._reserved:
            raise PromptError("bad_prompt", _taken(taken))
        try:
            source = self._source(tools)
            self._warn_about_unused(source, tools, variables_of_chat)
            messages = [self._in_form(source, number, message) for number, message in enumerate(chat.messages)]
            return self._apply(source, messages, tools=tools, **variables_of_chat)
        except PromptError:
            raise
        except Exception as error:  # templates are programs of their authors
            raise PromptError("bad_prompt", _refusal(error)) from error

    def _source(self, tools: list[Tool] | None) -> str:
        """Return the template that serves a chat; a tokenizer may have another one for chats with tools."""
        return str(self._tokenizer.get_chat_template(self._template, tools))  # type: ignore[arg-type]

    def _apply(self, source: str, messages: Sequence[Message], **options: Any) -> str:
        template, dates = pinned(source, self.dates)
        continued = messages[-1]["role"] in ASSISTANT_ROLES
        rendered = self._tokenizer.apply_chat_template(
            messages,  # type: ignore[arg-type]
            chat_template=template,
            tokenize=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            **dates,
            **options,
        )
        assert isinstance(rendered, str)
        return rendered

    def rendered_turns(self, *messages: tuple[str, str]) -> str | None:
        """Render messages of (role, content) with their last turn closed; None if the template refuses them."""
        try:
            source = self._source(None)
            shaped = [self._in_form(source, 0, {"role": role, "content": content}) for role, content in messages]
            template, dates = pinned(source, self.dates)
            rendered = self._tokenizer.apply_chat_template(
                shaped,  # type: ignore[arg-type]
                chat_template=template,
                tokenize=False,
                **dates,
                **self._variables,
            )
        except Exception:  # noqa: BLE001  # templates are programs of their authors
            return None
        return str(rendered)

    # -- forms of content ----------------------------------------------------------------------------

    def _in_form(self, source: str, number: int, message: Message) -> Message:
        """Return the message with its content and the arguments of its tool calls as the template takes them."""
        if message.get("tool_calls"):
            message = self._calls_in_form(source, number, message)
        return self._content_in_form(source, number, message)

    def _calls_in_form(self, source: str, number: int, message: Message) -> Message:
        as_text, as_object = (self._accepts_arguments(source, as_text) for as_text in (True, False))
        if as_text and as_object:
            return message
        return with_text_arguments(message) if as_text else with_object_arguments(number, message)

    def _content_in_form(self, source: str, number: int, message: Message) -> Message:
        """Return the message with its content as text or as parts, whichever the template takes."""
        content, role = message.get("content"), message["role"]
        if isinstance(content, list | tuple):
            taken = self._accepts(source, role, parts=True)
            return {**message, "content": as_parts(content) if taken else joined_parts(number, content)}
        if isinstance(content, str) and not self._accepts(source, role, parts=False):
            return {**message, "content": as_parts(content)} if self._accepts(source, role, parts=True) else message
        return message

    def _accepts(self, source: str, role: str, parts: bool) -> bool:
        """Return whether the template writes the text of such a content, found by a trial."""
        key = (source, role, parts)
        if key not in self._accepted:
            probe: Message = {"role": role, "content": as_parts(_PROBE) if parts else _PROBE}
            user = {"role": "user", "content": as_parts("a") if parts else "a"}
            chats = {"user": [probe], "system": [probe, user], "developer": [probe, user]}
            try:
                rendered = self._apply(source, chats.get(role, [user, probe]), tools=None, **self._variables)
                self._accepted[key] = _PROBE in rendered and not _PRINTED_PARTS.search(rendered)
            except Exception:  # noqa: BLE001  # templates are programs of their authors
                self._accepted[key] = False
        return self._accepted[key]

    def _accepts_arguments(self, source: str, as_text: bool) -> bool:
        """Return whether the template writes arguments of tool calls that are JSON text, or objects; by a trial."""
        key = (source, as_text)
        if key not in self._accepted_arguments:
            chat: list[Message] = [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "", "tool_calls": probe_calls(as_text)},
                {"role": "tool", "content": "a", "name": "probe", "tool_call_id": "rollout00"},
            ]
            try:
                chat = [self._content_in_form(source, number, message) for number, message in enumerate(chat)]
                rendered = self._apply(source, chat, tools=None, **self._variables)
                self._accepted_arguments[key] = are_written(rendered, as_text)
            except Exception:  # noqa: BLE001  # templates are programs of their authors
                self._accepted_arguments[key] = False
        return self._accepted_arguments[key]

    # -- what a template ignores ---------------------------------------------------------------------

    def _warn_about_unused(self, source: str, tools: list[Tool] | None, given: Mapping[str, Any]) -> None:
        """Warn once about each variable that the template does not read."""
        names = [*given, *(["tools"] if tools else [])]
        for name in names:
            if name not in self._warned and name not in variables(source):
                self._warned.add(name)
                what = "tools" if name == "tools" else f"chat_template_kwargs.{name}"
                logger.warning("The chat template does not use %s, which changes nothing in the prompts.", what)


def _taken(names: set[str]) -> str:
    return f"chat_template_kwargs has {', '.join(sorted(names))}, which is no variable of a chat template: remove it."


def _refusal(error: Exception) -> str:
    """Describe why a chat cannot be rendered."""
    reason = shorten(" ".join(str(error).split()) or type(error).__name__, 200)
    if "continue_final_message" in reason:
        return (
            "The chat ends with an assistant's message, which the chat template cannot leave open to be continued "
            f"({reason}): end it with another role, or use a template that keeps the message."
        )
    return f"The chat template cannot render the messages: {reason}"
