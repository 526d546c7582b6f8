"""Token ids as the model and the tokenizer know them when a call begins: how many there are, and which end a text."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from rollout.engine.completion_ends import joined_eos_ids
from rollout.engine.detokenizer import Detokenizer
from rollout.engine.rule_compiler import RuleCompiler
from rollout.errors import InputError
from rollout.models.module.inspect import logits_size, unwrap_model, vocabulary_size

logger = logging.getLogger(__name__)

#: Special tokens that calls and trainers put beside a text's own.
_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What one call knows of token ids."""

    size: int
    """Number of token ids that the model can embed."""
    eos_ids: tuple[int, ...]
    """End-of-sequence ids of the model and of the tokenizer."""
    rules: RuleCompiler
    detokenizer: Detokenizer


class LiveVocabulary:
    """Reads the vocabulary anew for every call, since a trainer may resize embeddings or name other end tokens.

    Args:
        model: a transformers causal LM, wrapped or not.
        tokenizer: of that model, or None.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        InputError: the tokenizer is of another model.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, *, skip_special_tokens: bool
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._known: tuple[object, ...] | None = None
        self._warned_of_added = False
        self._vocabulary = self.read()

    def read(self) -> Vocabulary:
        """Return the vocabulary as it is now; the same object while nothing has changed.

        Raises:
            InputError: the tokenizer has ids that the model cannot embed.
        """
        tokenizer = self._tokenizer
        size, drawn = vocabulary_size(self._model), logits_size(self._model)
        eos_ids = joined_eos_ids(unwrap_model(self._model).generation_config, tokenizer)
        special = () if tokenizer is None else (len(tokenizer), *tokenizer.all_special_ids)
        known = (size, drawn, eos_ids, special)
        if known != self._known:
            if tokenizer is not None:
                self._check(tokenizer, size)
            self._vocabulary = Vocabulary(
                size=size,
                eos_ids=eos_ids,
                rules=RuleCompiler(tokenizer, eos_ids=eos_ids, vocab_size=min(size, drawn)),
                detokenizer=Detokenizer(tokenizer, self._skip_special_tokens),
            )
            self._known = known
        return self._vocabulary

    def _check(self, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        """Refuse a tokenizer of another model; warn of added tokens, of which some models' own have too many."""
        roles = {name: value for name in _ROLES if (value := getattr(tokenizer, name, None)) is not None}
        outside = [f"{name} {value}" for name, value in roles.items() if not 0 <= value < size]
        if tokenizer.vocab_size > size:
            outside.append(f"{tokenizer.vocab_size} tokens")
        if outside:
            raise InputError(
                f"tokenizer has {' and '.join(outside)}, but the model embeds {size} token ids: give the model's own "
                "tokenizer, or resize the embeddings (model.resize_token_embeddings)."
            )
        if len(tokenizer) > size and not self._warned_of_added:
            self._warned_of_added = True
            logger.warning(
                "The tokenizer has %d tokens and the model embeds %d token ids: a prompt with one of the others "
                "becomes an error record.",
                len(tokenizer),
                size,
            )
