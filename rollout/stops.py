"""When a completion ends, and what its text is."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class Text:
    """Token ids to text, and stop strings found in it.

    Stop strings are searched in the text without special tokens. A completion's ids end with the token
    that completes the stop string; its text ends before the stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens; empty without a tokenizer."""
        if self._tokenizer is None:
            return ""
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def ends_at_stop(self, ids: Sequence[int], stops: Sequence[str]) -> bool:
        """Whether the last token of ``ids`` completes one of ``stops``.

        Only a tail is decoded: a character is at most four tokens, so the tail holds any stop string
        whole, with some tokens to spare for a first one that decodes differently at the start.
        """
        tail = list(ids[-(4 * max(map(len, stops)) + 8) :])
        text = self.decode(tail)
        return any(stop in text for stop in stops) and self.cut(self.decode(ids), stops) is not None

    def cut(self, text: str, stops: Sequence[str]) -> str | None:
        """``text`` before its earliest stop string; None when it has none."""
        found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
        return text[: min(found)] if found else None
