"""Encode prompts: texts, chats and token ids."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ParamSpec, TypeVar, cast

from transformers import PreTrainedTokenizerBase

from rollout.errors import InputError, PromptError
from rollout.tokenization.chat_template import ChatTemplate
from rollout.tokenization.prompt import Chat, EncodedPrompt, EncodingOptions, Message, Prompt
from rollout.tokenization.special_tokens import Surroundings, surroundings
from rollout.tokenization.turn_end import Turns, turns_of

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Text:
    """The text of a prompt before it is tokenised."""

    text: str
    is_chat: bool
    add_special_tokens: bool
    """Whether the tokenizer adds its special tokens."""


def _caught(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | PromptError:
    """Return what a function returns, or the error of the one prompt that it is called for."""
    try:
        return function(*args, **kwargs)
    except PromptError as error:
        return error


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
        self._turns_by_eos: dict[int | None, Turns] = {}
        self._said: set[str] = set()

    @property
    def has_tokenizer(self) -> bool:
        """Whether prompts and stop strings may be texts."""
        return self._given is not None

    @property
    def pad_id(self) -> int | None:
        """The id that the tokenizer pads with, as it is set now; None without one."""
        return None if self._given is None else self._given.pad_token_id

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
        (encoded,) = self.encode_batch([prompt])
        if isinstance(encoded, PromptError):
            raise encoded
        return encoded

    def encode_batch(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt | PromptError]:
        """Encode prompts as `encode` does each, in less time; the error of one that cannot be encoded is returned.

        A tokenizer of the ``tokenizers`` library works without Python's lock meanwhile, and on several cores.

        Raises:
            InputError: there is no tokenizer, or no chat template for messages.
        """
        forms = [_caught(self._form, prompt) for prompt in prompts]
        texts = [form for form in forms if isinstance(form, _Text)]
        tokenised = iter(self._tokenize_texts(texts))
        return [_caught(self._finish, form, next(tokenised)) if isinstance(form, _Text) else form for form in forms]

    def _form(self, prompt: Prompt) -> _Text | EncodedPrompt:
        """Return the text that a prompt is, or becomes as a chat, or its token ids."""
        if isinstance(prompt, str):
            around, add = self._surroundings, self._options.add_special_tokens
            return _Text(prompt, is_chat=False, add_special_tokens=add is True or (add == "auto" and around is None))
        if isinstance(prompt, Chat):
            return self._rendered(prompt)
        # Test for int first: isinstance with Mapping is slow, and a prompt may have thousands of ids.
        if any(not isinstance(item, int) and isinstance(item, Mapping) for item in prompt):
            return self._rendered(Chat(cast(Sequence[Message], prompt)))
        try:
            ids = [operator.index(item) for item in cast(Sequence[int], prompt)]
        except TypeError as error:
            raise PromptError("bad_prompt", f"The prompt holds other than token ids: {error}.") from error
        if ids and not -(2**63) <= min(ids) <= max(ids) < 2**63:
            raise PromptError("bad_prompt", "The prompt has numbers beyond 64 bits, which are no token ids.")
        return EncodedPrompt(ids)

    def encode_completion(self, text: str) -> list[int]:
        """Return the token ids of a completion's text as it stands: no special token is added, none at its end either.

        Raises:
            PromptError: the text cannot be encoded.
            InputError: there is no tokenizer.
        """
        ids = self._tokenize(text, add_special_tokens=False)
        if isinstance(ids, PromptError):
            raise ids
        return ids

    # -- texts ---------------------------------------------------------------------------------------

    def _finish(self, text: _Text, ids: list[int] | PromptError) -> EncodedPrompt:
        """Return the prompt that the token ids of its text make."""
        if isinstance(ids, PromptError):
            raise ids
        if text.is_chat:
            return EncodedPrompt(ids, self._turns.end_ids)
        around = self._surroundings
        if around is not None and self._options.add_special_tokens == "auto":
            if around.behind:
                self._say("The tokenizer puts %s behind every text; prompts go without.", around.behind)
            if around.before and tuple(ids[: len(around.before)]) == around.before:
                self._say("A text that begins with %s already gets no second one.", around.before)
            else:
                ids = [*around.before, *ids]
        if self._turns.marks.isdisjoint(ids[len(around.before) if around else 0 :]):
            return EncodedPrompt(ids)
        return EncodedPrompt(ids, self._turns.end_ids)

    def _tokenize_texts(self, texts: Sequence[_Text]) -> list[list[int] | PromptError]:
        """Return the token ids of each text; those that special tokens are added to in the same way go together."""
        found: dict[int, list[int] | PromptError] = {}
        for add in (False, True):
            places = [place for place, text in enumerate(texts) if text.add_special_tokens is add]
            batch = self._tokenize_batch([texts[place].text for place in places], add)
            found.update(zip(places, batch, strict=True))
        return [found[place] for place in range(len(texts))]

    def _tokenize_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int] | PromptError]:
        # Only fast tokenizers are faster on a batch.
        if len(texts) > 1 and getattr(self._given, "is_fast", False):
            try:
                batch = self._tokenizer("texts")(texts, add_special_tokens=add_special_tokens)["input_ids"]
                return [list(ids) for ids in batch]
            except Exception as error:  # noqa: BLE001  # a text is at fault: each alone tells which
                logger.debug("A batch of texts cannot be tokenised, so each is tokenised alone: %s", error)
        return [self._tokenize(text, add_special_tokens) for text in texts]

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int] | PromptError:
        tokenizer = self._tokenizer("texts")
        try:
            return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        except Exception as error:  # noqa: BLE001  # tokenizers raise many kinds of errors, e.g. for a lone surrogate
            reason = " ".join(str(error).split())
            try:
                text.encode()
            except UnicodeEncodeError as broken:
                reason = f"character {broken.start} is half of a surrogate pair, {text[broken.start]!r}"
            refused = PromptError("bad_prompt", f"The text cannot be tokenised: {reason}.")
            refused.__cause__ = error
            return refused

    def _say(self, message: str, ids: Sequence[int]) -> None:
        """Log a sentence about special tokens once."""
        if message not in self._said:
            self._said.add(message)
            tokens = self._tokenizer("texts").convert_ids_to_tokens(list(ids))
            logger.info(message + " (add_special_tokens=true: as the tokenizer adds them.)", " ".join(tokens))

    # -- chats ---------------------------------------------------------------------------------------

    def _rendered(self, chat: Chat) -> _Text:
        self._tokenizer("chat messages")
        if self._template is None or not self._template.exists:
            raise InputError("The prompt is a list of chat messages, but the tokenizer has no chat template.")
        if not chat.messages:
            raise PromptError("empty_prompt", "The chat has no messages.")
        rendered = self._template.render(chat)
        return _Text(rendered, is_chat=True, add_special_tokens=self._options.add_special_tokens is True)

    @property
    def _turns(self) -> Turns:
        """What the template writes around turns; nothing without a template."""
        if self._given is None or self._template is None or not self._template.exists:
            return Turns()
        eos = self._given.eos_token_id  # a trainer may name another one between calls
        if eos not in self._turns_by_eos:
            self._turns_by_eos[eos] = turns_of(self._given, self._template)
        return self._turns_by_eos[eos]

    @cached_property
    def _surroundings(self) -> Surroundings | None:
        return surroundings(self._tokenizer("texts"))

    def _tokenizer(self, kind: str) -> PreTrainedTokenizerBase:
        if self._given is None:
            raise InputError(f"The engine has no tokenizer for {kind}: create it with one, or pass lists of token ids.")
        return self._given
