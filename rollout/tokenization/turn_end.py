"""Find the token that ends an assistant's turn in a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from rollout.tokenization.chat_template import ChatTemplate
from rollout.tokenization.special_tokens import find_special

_USER = "rolloutuser"
_ANSWER = "rolloutanswer"


@dataclass(frozen=True, slots=True)
class Turns:
    """What a chat template writes around turns."""

    end_ids: tuple[int, ...] = ()
    """Tokens that end an assistant's turn: the template's, and the tokenizer's end of sequence."""
    marks: frozenset[int] = frozenset()
    """Special tokens by which a rendered chat is told from other text."""


def turns_of(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> Turns:
    """Find the tokens that end a turn, by rendering a chat of three messages."""
    eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    last = template.rendered_turns(("user", _USER), ("assistant", _ANSWER)) or ""
    inner = template.rendered_turns(("user", _USER), ("assistant", _ANSWER), ("user", _USER)) or ""
    after_last = find_special(tokenizer, last.rpartition(_ANSWER)[2]) if _ANSWER in last else []
    after_inner = find_special(tokenizer, inner.rpartition(_ANSWER)[2]) if _ANSWER in inner else []
    ends = dict.fromkeys([*_turn_end(after_last, after_inner), *eos])
    # A token at the very beginning only is the one that begins every text.
    return Turns(end_ids=tuple(ends), marks=frozenset(find_special(tokenizer, inner or last)[1:]) - {*eos})


def _turn_end(after_last: Sequence[int], after_inner: Sequence[int]) -> list[int]:
    """Return the special token that closes an assistant's turn, given those after the last turn and after an inner one.

    What stands after both is the turn's own; some templates write a further token at the end of the whole chat, and
    some end the last turn by another token than inner ones. If nothing closes a turn, the next turn's first token does.
    """
    if not (after_last and after_inner):
        return [*after_last[-1:], *after_inner[:1]]
    in_both = takewhile(lambda pair: pair[0] == pair[1], zip(after_last, after_inner, strict=False))
    return [token for token, _ in in_both][-1:] or [after_last[-1]]
