"""Compile sampling parameters into token rules for one model and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from rollout.errors import InputError
from rollout.models.sampling.token_rules import TokenRules, token_rules
from rollout.sampling_params import SamplingParams

#: Different rules kept, so that equal parameters share one object and its tables.
_REMEMBERED = 1 << 12


class RuleCompiler:
    """Compiles the parameters that change logits before temperature and filters.

    Args:
        tokenizer: encodes bad words; None if only ids are given.
        eos_ids: end-of-sequence ids of the model.
        vocab_size: ids must be below this.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, eos_ids: Sequence[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = tuple(eos_ids)
        self._vocab_size = vocab_size
        self._compiled: dict[tuple[object, ...], TokenRules | None] = {}

    def compile(self, params: SamplingParams, end_ids: Sequence[int] = ()) -> TokenRules | None:
        """Return the rules of ``params``, or None if they change no logits.

        Args:
            end_ids: further ids that end a completion.

        Raises:
            InputError: an id is outside of the vocabulary, or bad words are strings and there is no tokenizer.
        """
        key = (
            params.allowed_token_ids,
            params.logit_bias,
            params.bad_words,
            params.min_new_tokens,
            params.stop_token_ids,
            end_ids if params.min_new_tokens else (),
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        if key not in self._compiled:
            if len(self._compiled) >= _REMEMBERED:
                self._compiled.clear()
            self._compiled[key] = self._rules(params, end_ids)
        return self._compiled[key]

    def _rules(self, params: SamplingParams, end_ids: Sequence[int]) -> TokenRules | None:
        bias = dict(params.logit_bias or ())
        words = list(self._words(params.bad_words or ()))
        for name, ids in (
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("logit_bias", bias),
            ("bad_words", [i for word in words for i in word]),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if ids and max(ids) >= self._vocab_size:
                raise InputError(f"{name} has the token id {max(ids)}, but the last one is {self._vocab_size - 1}.")
        # An end id outside of the vocabulary is never drawn.
        stop_ids = [i for i in (*self._eos_ids, *params.stop_token_ids, *end_ids) if i < self._vocab_size]
        rules = token_rules(
            allowed=params.allowed_token_ids or (),
            bias=bias,
            bad_words=words,
            stop_ids=stop_ids,
            min_new_tokens=params.min_new_tokens,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
        )
        if rules is not None and rules.leaves_nothing(self._vocab_size):
            raise InputError("allowed_token_ids, bad_words, logit_bias and min_new_tokens together ban every token.")
        return rules

    def _words(self, bad_words: Sequence[str | tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
        """Yield the token ids of bad words; of a string, as it begins a text, stands behind a space or in a line."""
        for word in bad_words:
            if not isinstance(word, str):
                yield word
                continue
            if self._tokenizer is None:
                raise InputError("The engine has no tokenizer for bad_words: create it with one, or give token ids.")
            text = word.strip()
            yield self._encode(text)
            yield self._encode(f" {text}")
            # Tokenizers that mark the beginning of a text encode a word behind a line break differently.
            line_break = self._encode("\n")
            behind = self._encode(f"\n{text}")
            if behind[: len(line_break)] == line_break and len(behind) > len(line_break):
                yield behind[len(line_break) :]

    def _encode(self, text: str) -> tuple[int, ...]:
        assert self._tokenizer is not None
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
