"""Decode completions and find stop strings in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

Ids = Sequence[int] | NDArray[np.int64]


class Detokenizer:
    """Decodes token ids and finds stop strings in the text.

    Stop strings are searched in the text without special tokens. A completion's ids end with the token
    that completes the stop string; its text ends before the stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer

    def decode(self, ids: Ids) -> str:
        """Return the text of ``ids`` without special tokens, or an empty string without a tokenizer."""
        if self._tokenizer is None:
            return ""
        plain_ids = [int(i) for i in ids]
        return str(self._tokenizer.decode(plain_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def ends_at_stop(self, ids: Ids, stops: Sequence[str]) -> bool:
        """Return whether the text of ``ids`` contains one of ``stops``.

        This runs after every token, so the whole text is decoded only if a tail contains a stop string. A character
        takes at most four tokens; 8 more allow for a first token that decodes differently without its predecessors.
        """
        size = 4 * max(map(len, stops)) + 8
        tail = self.decode(ids[-size:])
        if "\ufffd" in tail:  # The tail may begin inside a character; some decoders then replace all bytes after it.
            tail += "".join(self.decode(ids[-size - shift :]) for shift in (1, 2, 3))
        return any(stop in tail for stop in stops) and _first_stop(self.decode(ids), stops) is not None

    def before_stop(self, ids: Ids, stops: Sequence[str]) -> str:
        """Return the text of ``ids`` up to its earliest stop string."""
        text = self.decode(ids)
        return text[: _first_stop(text, stops)]


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return the index of the earliest stop string, or None."""
    return min((at for at in map(text.find, stops) if at >= 0), default=None)
