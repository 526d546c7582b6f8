"""Tell a model's reasoning from its answer: what stands between its think tokens, and what follows them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rollout.engine.detokenizer import Detokenizer, Ids, cut_at_stop, special_ids, special_pattern
from rollout.errors import InputError

logger = logging.getLogger(__name__)


class ThinkTokens(NamedTuple):
    """The texts that begin and end reasoning."""

    begin: str
    end: str


#: Of Qwen, DeepSeek and most others; Magistral; Command A; Seed-OSS; gpt-oss.
_KNOWN = (
    ThinkTokens("<think>", "</think>"),
    ThinkTokens("[THINK]", "[/THINK]"),
    ThinkTokens("<|START_THINKING|>", "<|END_THINKING|>"),
    ThinkTokens("<seed:think>", "</seed:think>"),
    ThinkTokens("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)
_MOST_PROMPT_TOKENS = 4096


class CompletionText(NamedTuple):
    """A completion's text, in two parts."""

    reasoning: str
    text: str


class ReasoningSplitter:
    """Splits completions at the think tokens that the tokenizer or its chat template knows.

    Only reasoning at the beginning of a completion counts, or reasoning that the prompt has begun, as some chat
    templates do. Reasoning without an end is all of the completion.

    Args:
        tokenizer: decodes prompts and completions.
        skip_special_tokens: leave special tokens out of both parts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True) -> None:
        self.tokens = find_think_tokens(tokenizer)
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
        self._special = special_pattern(tokenizer if skip_special_tokens else None)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        marks = set(self.tokens)
        self._boundaries = {i for i, token in added.items() if token.content not in marks and token.content.strip()}

    def split(self, prompt_ids: Ids, ids: Ids, stops: Sequence[str]) -> CompletionText | None:
        """Split a completion, each part cut at its earliest stop string; None if it has no reasoning."""
        begin, end = self.tokens
        whole = self._detokenizer.decode_after(prompt_ids, ids)
        # Special tokens are removed below; the think tokens part the text even where one of them is a stop string.
        whole = cut_at_stop(whole, [stop for stop in stops if stop not in self.tokens and self._special.search(stop)])
        begun = self._prompt_begins_reasoning(prompt_ids)
        if whole.lstrip().startswith(begin):
            begun, whole = True, whole.lstrip().removeprefix(begin)
        # Without a begin, the end alone tells that the prompt began the reasoning in a way of its own.
        if not begun and end not in whole.partition(begin)[0]:
            return None
        reasoning, _, text = whole.partition(end)
        reasoning, text = self._special.sub("", reasoning), self._special.sub("", text)
        cut = cut_at_stop(reasoning, stops)
        return CompletionText(cut, cut_at_stop(text, stops) if cut == reasoning else "")

    def _prompt_begins_reasoning(self, prompt_ids: Ids) -> bool:
        """Return whether the prompt's last turn has begun reasoning and not ended it."""
        turn: list[int] = []
        for token in reversed(prompt_ids):
            if token in self._boundaries or len(turn) == _MOST_PROMPT_TOKENS:
                break
            turn.append(int(token))
        text = self._detokenizer.decode(turn[::-1])
        return text.rfind(self.tokens.begin) > text.rfind(self.tokens.end)


def find_think_tokens(tokenizer: PreTrainedTokenizerBase) -> ThinkTokens:
    """Return the think tokens of a tokenizer's vocabulary or chat template; warn if it has none of those known."""
    template = tokenizer.chat_template or ""
    templates = "\n".join(template.values()) if isinstance(template, dict) else str(template)
    vocabulary = tokenizer.get_vocab()
    for tokens in _KNOWN:
        if tokens.end in vocabulary or tokens.end in templates or tokens.begin in templates:
            return tokens
    logger.warning(
        "split_reasoning: neither the tokenizer nor its chat template has think tokens; reasoning is split from the "
        "text only where a completion writes %s and %s.",
        *_KNOWN[0],
    )
    return _KNOWN[0]


def reasoning_splitter(
    tokenizer: PreTrainedTokenizerBase | None, *, split: bool, skip_special_tokens: bool
) -> ReasoningSplitter | None:
    """Return what splits reasoning from text if ``split``; else warn of reasoning without its tokens.

    Raises:
        InputError: there is no tokenizer to split with.
    """
    if split and tokenizer is None:
        raise InputError("split_reasoning needs a tokenizer: create the engine with one.")
    if tokenizer is None:
        return None
    if split:
        return ReasoningSplitter(tokenizer, skip_special_tokens)
    if skip_special_tokens:
        warn_if_skipped(tokenizer)
    return None


def warn_if_skipped(tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn that think tokens are left out of the text where they are special tokens."""
    special = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    if found := [token for tokens in _KNOWN for token in tokens if token in special]:
        logger.warning(
            "%s are special tokens, so the text does not have them: skip_special_tokens=false keeps them, and "
            "split_reasoning=true tells reasoning from the answer.",
            " and ".join(found),
        )
