"""The token ids that end completions: the model's, those of a chat's turn, and special tokens among stop strings."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from transformers import GenerationConfig, PreTrainedTokenizerBase

from rollout.generation_defaults import eos_ids
from rollout.requests import Request
from rollout.tokenization.special_tokens import ids_of_special_strings

logger = logging.getLogger(__name__)


class CompletionEnds:
    """Knows the model's end-of-sequence ids, and adds to requests the ids that end their completions.

    Args:
        generation_config: of the model; its end-of-sequence ids hold for every prompt.
        tokenizer: its end-of-sequence id is used if the model has none; its special tokens may be stop strings.
    """

    def __init__(self, generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self.eos_ids = list(eos_ids(generation_config))
        """The model's end-of-sequence ids, of which it may have several."""
        if not self.eos_ids and tokenizer is not None and tokenizer.eos_token_id is not None:
            self.eos_ids = [int(tokenizer.eos_token_id)]
            logger.info(
                "The model names no end-of-sequence id; the tokenizer's is used: %s.", self._names(self.eos_ids)
            )
        self._said_turn_end = False
        self._said_eos = False
        self._said_stops: set[int] = set()
        self._special_stops = lru_cache(maxsize=256)(self._find_special_stops)

    def applied(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Yield the requests with the ids of special tokens among their stop strings, and say once what ends them."""
        for request in requests:
            if request.end_ids and not self._said_turn_end:
                self._say_turn_end(request.end_ids)
            params = request.params
            if params.stop_at_turn_end and not (
                request.end_ids or request.error_class or self._said_eos or params.ignore_eos
            ):
                self._say_other_eos(request.params.stop_token_ids)
            special = self._special_stops(request.params.stop) if request.params.stop else ()
            yield replace(request, end_ids=(*request.end_ids, *special)) if special else request

    def _say_turn_end(self, ids: Iterable[int]) -> None:
        self._said_turn_end = True
        if new := [i for i in ids if i not in self.eos_ids]:
            logger.info(
                "Chat completions also end at %s, the end of the assistant's turn, which is not among the model's "
                "end-of-sequence ids %s (stop_at_turn_end=false: only these).",
                self._names(new),
                self.eos_ids,
            )

    def _say_other_eos(self, stop_ids: Sequence[int]) -> None:
        """Warn if the tokenizer's end of sequence ends no text, as is so with ``generate``."""
        self._said_eos = True
        eos = None if self._tokenizer is None else self._tokenizer.eos_token_id
        if eos is not None and eos not in (*self.eos_ids, *stop_ids):
            logger.warning(
                "Completions of plain prompts end at the model's end-of-sequence ids %s, but not at the tokenizer's "
                "%s: add it to stop_token_ids if they should.",
                self.eos_ids,
                self._names([eos]),
            )

    def _find_special_stops(self, stops: tuple[str, ...]) -> tuple[int, ...]:
        if self._tokenizer is None:
            return ()
        ids = tuple(ids_of_special_strings(self._tokenizer, stops).values())
        if new := [i for i in ids if i not in self._said_stops]:
            self._said_stops.update(new)
            logger.info("Among the stop strings are special tokens, which are found by id: %s.", self._names(new))
        return ids

    def _names(self, ids: Iterable[int]) -> str:
        assert self._tokenizer is not None
        return ", ".join(f"{self._tokenizer.convert_ids_to_tokens(i)} (id {i})" for i in ids)
