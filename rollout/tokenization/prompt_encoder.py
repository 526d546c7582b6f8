"""Encode prompts: texts, chats and token ids."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import cast

from transformers import PreTrainedTokenizerBase

from rollout.errors import InputError, PromptError
from rollout.tokenization.chat_template import ChatTemplate
from rollout.tokenization.prompt import Chat, EncodedPrompt, EncodingOptions, Message, Prompt
from rollout.tokenization.special_tokens import Surroundings, surroundings
from rollout.tokenization.turn_end import Turns, turns_of

logger = logging.getLogger(__name__)


class PromptEncoder:
    """Turns prompts into token ids.

    Args:
        tokenizer: encodes texts and rendered chats; None if prompts are token ids.
        options: the template, its variables, and which special tokens are added.
        dates: what the template's clock gives (`ChatTemplate.dates`); None: what it gives now.

    Raises:
        InputError: an option cannot be used with this tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        options: EncodingOptions | None = None,
        dates: Mapping[str, str] | None = None,
    ) -> None:
        self._given = tokenizer
        self._options = options or EncodingOptions()
        if self._options.add_special_tokens not in (True, False, "auto"):
            raise InputError(
                f"add_special_tokens is {self._options.add_special_tokens!r}, but must be auto, true or false."
            )
        self._template = None if tokenizer is None else ChatTemplate(tokenizer, self._options, dates)
        self._said: set[str] = set()

    @property
    def has_tokenizer(self) -> bool:
        """Whether prompts and stop strings may be texts."""
        return self._given is not None

    @property
    def dates(self) -> Mapping[str, str]:
        """What the template's clock gives, by format; empty if the template has no clock."""
        return {} if self._template is None else self._template.dates

    def dated(self, dates: Mapping[str, str]) -> PromptEncoder:
        """Return an encoder whose template writes these dates."""
        return self if dates == self.dates else PromptEncoder(self._given, self._options, dates)

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Return the token ids of a prompt, and those that end an assistant's turn if it is a chat.

        Raises:
            PromptError: this prompt cannot be encoded.
            InputError: there is no tokenizer, or no chat template for messages.
        """
        if isinstance(prompt, str):
            return self._encode_text(prompt)
        if isinstance(prompt, Chat):
            return self._encode_chat(prompt)
        # Test for int first: isinstance with Mapping is slow, and a prompt may have thousands of ids.
        if any(not isinstance(item, int) and isinstance(item, Mapping) for item in prompt):
            return self._encode_chat(Chat(cast(Sequence[Message], prompt)))
        try:
            return EncodedPrompt([operator.index(item) for item in cast(Sequence[int], prompt)])
        except TypeError as error:
            raise PromptError("bad_prompt", f"The prompt holds other than token ids: {error}.") from error

    # -- texts ---------------------------------------------------------------------------------------

    def _encode_text(self, text: str) -> EncodedPrompt:
        add, around = self._options.add_special_tokens, self._surroundings
        if around is None or add != "auto":
            ids = self._tokenize(text, add_special_tokens=add is not False)
        else:
            ids = self._tokenize(text, add_special_tokens=False)
            if around.behind:
                self._say("The tokenizer puts %s behind every text; prompts go without.", around.behind)
            if around.before and tuple(ids[: len(around.before)]) == around.before:
                self._say("A text that begins with %s already gets no second one.", around.before)
            else:
                ids = [*around.before, *ids]
        if self._turns.marks.isdisjoint(ids[len(around.before) if around else 0 :]):
            return EncodedPrompt(ids)
        return EncodedPrompt(ids, self._turns.end_ids)

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer = self._tokenizer("texts")
        try:
            return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        except Exception as error:  # tokenizers raise many kinds of errors, e.g. for a lone surrogate
            reason = " ".join(str(error).split())
            try:
                text.encode()
            except UnicodeEncodeError as broken:
                reason = f"character {broken.start} is half of a surrogate pair, {text[broken.start]!r}"
            raise PromptError("bad_prompt", f"The text cannot be tokenised: {reason}.") from error

    def _say(self, message: str, ids: Sequence[int]) -> None:
        """Log a sentence about special tokens once."""
        if message not in self._said:
            self._said.add(message)
            tokens = self._tokenizer("texts").convert_ids_to_tokens(list(ids))
            logger.info(message + " (add_special_tokens=true: as the tokenizer adds them.)", " ".join(tokens))

    # -- chats ---------------------------------------------------------------------------------------

    def _encode_chat(self, chat: Chat) -> EncodedPrompt:
        self._tokenizer("chat messages")
        if self._template is None or not self._template.exists:
            raise InputError("The prompt is a list of chat messages, but the tokenizer has no chat template.")
        if not chat.messages:
            raise PromptError("empty_prompt", "The chat has no messages.")
        rendered = self._template.render(chat)
        ids = self._tokenize(rendered, add_special_tokens=self._options.add_special_tokens is True)
        return EncodedPrompt(ids, self._turns.end_ids)

    @cached_property
    def _turns(self) -> Turns:
        """What the template writes around turns; nothing without a template."""
        if self._given is None or self._template is None or not self._template.exists:
            return Turns()
        return turns_of(self._given, self._template)

    @cached_property
    def _surroundings(self) -> Surroundings | None:
        return surroundings(self._tokenizer("texts"))

    def _tokenizer(self, kind: str) -> PreTrainedTokenizerBase:
        if self._given is None:
            raise InputError(f"The engine has no tokenizer for {kind}: create it with one, or pass lists of token ids.")
        return self._given
