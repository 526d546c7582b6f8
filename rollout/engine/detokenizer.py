"""Decode completions and find stop strings in them."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

Ids = Sequence[int] | NDArray[np.int64]

_CONTEXT_TOKENS = 8
"""Prompt tokens that are decoded before a completion: some decoders drop the space that a text begins with."""
_MOST_CONTEXT_TOKENS = 512


class Detokenizer:
    """Decodes token ids and finds stop strings in the text.

    A completion's text is what follows the prompt's text, spaces included. Stop strings are searched in it; those that
    name a special token are searched in the text with special tokens. A completion's ids end with the token that
    completes the stop string; its text ends before the stop string.

    Args:
        tokenizer: decodes; None: all text is empty.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._special_ids = frozenset() if tokenizer is None else frozenset(special_ids(tokenizer))
        self._special = special_pattern(tokenizer)
        self._whole = Detokenizer(tokenizer, skip_special_tokens=False) if skip_special_tokens else self
        self._naming_special = lru_cache(maxsize=256)(self._find_naming_special)

    def decode(self, ids: Ids) -> str:
        """Return the text of ``ids`` alone, or an empty string without a tokenizer."""
        if self._tokenizer is None:
            return ""
        plain_ids = [int(i) for i in ids]
        skip = self._skip_special_tokens
        return str(self._tokenizer.decode(plain_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    def decode_after(self, prompt_ids: Ids, ids: Ids) -> str:
        """Return the text of ``ids`` as it follows the prompt's text.

        If the prompt ends amid the bytes of a character, the character belongs to the completion.
        """
        size, before = _CONTEXT_TOKENS, ""
        while True:
            context = self._last_of(prompt_ids, size)
            before = self.decode(context)
            # The context may begin inside a character; some decoders then replace all bytes after it.
            if "\ufffd" not in before or len(context) < size or size >= _MOST_CONTEXT_TOKENS:
                break
            size *= 4
        text = self.decode([*context, *ids])
        if text.startswith(before):
            return text[len(before) :]
        return text[next(i for i, (a, b) in enumerate(zip(before, text + "\0", strict=False)) if a != b) :]

    def ends_at_stop(self, prompt_ids: Ids, ids: Ids, stops: Sequence[str], after: int = 0) -> bool:
        """Return whether the text of ``ids`` contains one of ``stops`` that ends behind the first ``after`` tokens.

        This runs after every token, so the whole text is decoded only if a tail contains a stop string. A character
        takes at most four tokens; 8 more allow for a first token that decodes differently without its predecessors.
        Special tokens that have no text are not counted, however many stand at the end.
        """
        if len(ids) <= after:
            return False
        named = self._naming_special(tuple(stops))
        if named and self._whole.ends_at_stop(prompt_ids, ids, named, after):
            return True
        size = 4 * max(map(len, stops)) + 8
        if len(ids) <= size:
            return self._contains_stop(prompt_ids, ids, stops, after)
        tail = self.decode(self._last_of(ids, size))
        if "\ufffd" in tail:  # The tail may begin inside a character; some decoders then replace all bytes after it.
            tail += "".join(self.decode(self._last_of(ids, size + shift)) for shift in (1, 2, 3))
        return any(stop in tail for stop in stops) and self._contains_stop(prompt_ids, ids, stops, after)

    def before_stop(self, prompt_ids: Ids, ids: Ids, stops: Sequence[str], after: int = 0) -> str:
        """Return the text of ``ids`` up to its earliest stop string that ends behind the first ``after`` tokens."""
        text = cut_at_stop(self.decode_after(prompt_ids, ids), stops, self._begin(prompt_ids, ids, after))
        if named := self._naming_special(tuple(stops)):
            whole = self._whole.decode_after(prompt_ids, ids)
            cut = self._whole.before_stop(prompt_ids, ids, named, after)
            if len(cut) < len(whole):
                return min(text, self._without_special(prompt_ids, ids, cut), key=len)
        return text

    def _without_special(self, prompt_ids: Ids, ids: Ids, cut: str) -> str:
        """Return the beginning ``cut`` of the text with special tokens, without them.

        By their ids: other tokens may spell the text of a special one.
        """

        def size(count: int) -> int:
            return len(self._whole.decode_after(prompt_ids, ids[:count]))

        count = bisect_right(range(len(ids) + 1), len(cut), key=size) - 1
        shown = self.decode_after(prompt_ids, ids[:count])
        amid_special = count == len(ids) or int(ids[count]) in self._special_ids
        return shown if amid_special else shown + cut[size(count) :]

    def _find_naming_special(self, stops: tuple[str, ...]) -> tuple[str, ...]:
        """Return the stop strings of special tokens and other text; one special token alone is found by its id."""
        if not self._skip_special_tokens:
            return ()
        return tuple(stop for stop in stops if self._special.search(stop) and not self._special.fullmatch(stop))

    def _contains_stop(self, prompt_ids: Ids, ids: Ids, stops: Sequence[str], after: int) -> bool:
        begin = self._begin(prompt_ids, ids, after)
        return _first_stop(self.decode_after(prompt_ids, ids), stops, begin) is not None

    def _begin(self, prompt_ids: Ids, ids: Ids, after: int) -> int:
        """Return the number of characters of the first ``after`` tokens."""
        return len(self.decode_after(prompt_ids, ids[:after])) if after else 0

    def _last_of(self, ids: Ids, size: int) -> list[int]:
        """Return up to ``size`` last tokens that have text."""
        last: list[int] = []
        for token in reversed(ids):
            if not self._skip_special_tokens or token not in self._special_ids:
                last.append(int(token))
                if len(last) == size:
                    break
        return last[::-1]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that decoding leaves out as special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {int(i) for i, token in added.items() if token.special} | {int(i) for i in tokenizer.all_special_ids}


def special_pattern(tokenizer: PreTrainedTokenizerBase | None) -> re.Pattern[str]:
    """Return the pattern of the special tokens that decoding leaves out; it matches nothing if there are none."""
    tokens = [] if tokenizer is None else tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    texts = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def cut_at_stop(text: str, stops: Sequence[str], begin: int = 0) -> str:
    """Return a text up to its earliest stop string that ends behind its first ``begin`` characters."""
    return text[: _first_stop(text, stops, begin)]


def _first_stop(text: str, stops: Sequence[str], begin: int = 0) -> int | None:
    """Return the index of the earliest stop string that ends behind the first ``begin`` characters, or None."""
    found = (text.find(stop, max(0, begin - len(stop) + 1)) for stop in stops)
    return min((at for at in found if at >= 0), default=None)
