"""What ends completions: end-of-sequence ids, the end of a chat's turn, and special tokens among stop strings."""

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


def joined_eos_ids(
    generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """Return the end-of-sequence ids of the model, of which it may have several, and then the tokenizer's.

    TRL joins them likewise. transformers' ``generate`` ends at the model's alone.
    """
    eos = None if tokenizer is None else tokenizer.eos_token_id
    return tuple(dict.fromkeys([*eos_ids(generation_config), *([] if eos is None else [int(eos)])]))


class CompletionEnds:
    """Adds to requests the ids that end their completions, and says once what ends them.

    Args:
        tokenizer: its special tokens may be stop strings.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._said_turn_end = False
        self._said_eos = False
        self._said_stops: set[int] = set()
        self._special_stops = lru_cache(maxsize=256)(self._find_special_stops)

    def applied(
        self, requests: Iterable[Request | None], end_ids: Sequence[int], generation_config: GenerationConfig | None
    ) -> Iterator[Request | None]:
        """Yield the requests with the ids of special tokens among their stop strings.

        Args:
            end_ids: the end-of-sequence ids of the call, see `joined_eos_ids`.
            generation_config: of the model.
        """
        of_model = eos_ids(generation_config)
        for request in requests:
            if request is None:
                yield None
                continue
            if request.end_ids and not self._said_turn_end:
                self._say_turn_end(request.end_ids, end_ids)
            if not (self._said_eos or request.error_class or request.params.ignore_eos):
                self._say_eos(end_ids, of_model)
            special = self._special_stops(request.params.stop) if request.params.stop else ()
            yield replace(request, end_ids=(*request.end_ids, *special)) if special else request

    def _say_turn_end(self, turn_ids: Iterable[int], end_ids: Sequence[int]) -> None:
        self._said_turn_end = True
        if new := [i for i in turn_ids if i not in end_ids]:
            logger.info(
                "Chat completions also end at %s, the end of the assistant's turn, which is not among the "
                "end-of-sequence ids %s (stop_at_turn_end=false: only these).",
                self._names(new),
                list(end_ids),
            )

    def _say_eos(self, end_ids: Sequence[int], of_model: Sequence[int]) -> None:
        """Say that completions end at the tokenizer's end of sequence as well, at which ``generate`` does not stop."""
        self._said_eos = True
        if new := [i for i in end_ids if i not in of_model]:
            logger.info(
                "Completions also end at the tokenizer's end of sequence, %s, which is not among those of the model's "
                "generation_config, %s (transformers' generate goes on there).",
                self._names(new),
                of_model,
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
