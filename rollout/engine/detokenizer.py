"""When a completion's text ends, and what that text is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

Ids = Sequence[int] | NDArray[np.int64]


class Detokenizer:
    """Token ids to text, and stop strings found in it.

    Stop strings are searched in the text without special tokens. A completion's ids end with the token
    that completes the stop string; its text ends before the stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer

    def decode(self, ids: Ids) -> str:
        """The text of ``ids`` without special tokens; empty without a tokenizer."""
        if self._tokenizer is None:
            return ""
        whole = [int(i) for i in ids]
        return str(self._tokenizer.decode(whole, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def ends_at_stop(self, ids: Ids, stops: Sequence[str]) -> bool:
        """Whether a string of ``stops`` is complete in the text of ``ids``.

        Called after every token, so a tail is looked at first: a character is at most four tokens, so the
        tail holds any stop string whole, with some to spare for a first token that decodes differently.
        """
        size = 4 * max(map(len, stops)) + 8
        tail = self.decode(ids[-size:])
        if "\ufffd" in tail:  # It may begin within a character, and some decoders then replace all bytes that follow.
            tail += "".join(self.decode(ids[-size - shift :]) for shift in (1, 2, 3))
        return any(stop in tail for stop in stops) and _first_stop(self.decode(ids), stops) is not None

    def before_stop(self, ids: Ids, stops: Sequence[str]) -> str:
        """The text of ``ids`` up to its earliest stop string."""
        text = self.decode(ids)
        return text[: _first_stop(text, stops)]


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins; None when there is none."""
    return min((at for at in map(text.find, stops) if at >= 0), default=None)
