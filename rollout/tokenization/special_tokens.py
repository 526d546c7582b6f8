"""The special tokens of a tokenizer: those it puts around texts, and those that a text names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The special tokens that a tokenizer puts before and behind every text."""

    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()


def surroundings(tokenizer: PreTrainedTokenizerBase) -> Surroundings | None:
    """Find what a tokenizer puts around texts; None if it changes the text's own tokens as well."""
    plain, whole = _ids(tokenizer, "a", add=False), _ids(tokenizer, "a", add=True)
    for start in range(len(whole) - len(plain) + 1):
        end = start + len(plain)
        if plain and whole[start:end] == plain:
            return Surroundings(before=tuple(whole[:start]), behind=tuple(whole[end:]))
    return None


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, add: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add)["input_ids"])


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the ids of special and added tokens by their text."""
    # Some tokenizers do not list the tokens of their roles, such as eos_token, among the added ones.
    roles = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {**tokenizer.get_added_vocab(), **roles}


def ids_of_special_strings(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> dict[str, int]:
    """Return those of ``strings`` that are the text of one special token, with its id."""
    known = special_ids(tokenizer)
    return {text: known[text] for text in strings if text in known}


def find_special(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of the special tokens that stand in a text, in their order."""
    known = {token: i for token, i in special_ids(tokenizer).items() if token.strip()}
    if not known:
        return []
    pattern = "|".join(re.escape(token) for token in sorted(known, key=len, reverse=True))
    return [known[token] for token in re.findall(pattern, text)]
