"""Reasoning apart from the text: begun by the completion or by the prompt, finished or not."""

from __future__ import annotations

import logging
from functools import cache

import pytest
from transformers import PreTrainedTokenizerBase

from rollout.engine.reasoning import CompletionText, ReasoningSplitter, find_think_tokens, warn_if_skipped
from tests.engine.test_detokenizer import SPECIAL, byte_level, with_byte_fallback

KINDS = {"special": True, "added": False, "text": None}
TOKENIZERS = {"byte level": byte_level, "byte fallback": with_byte_fallback}


@cache
def tokenizer_of(name: str, special: bool | None) -> PreTrainedTokenizerBase:
    """A tokenizer whose think tokens are special, plain added tokens, or only in its chat template."""
    TOKENIZERS[name].cache_clear()
    tokenizer = TOKENIZERS[name]()._tokenizer
    TOKENIZERS[name].cache_clear()
    assert tokenizer is not None
    if special is None:
        tokenizer.chat_template = "{{ messages }}<think>"
    else:
        tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("name", ["byte level"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion", "reasoning", "text"),
    [
        ("stop", "<think>the end</think> then", "the end", " then"),
        ("stop", "\n<think>the end</think> then" + SPECIAL, "the end", " then"),
        ("stop", "<think>the end", "the end", ""),
        ("stop", "then stop", "", "then stop"),
        ("stop", "then <think> stop", "", "then <think> stop"),
        ("stop", "<think></think>then", "", "then"),
        ("stop", "the</think>then", "the", "then"),
        (SPECIAL + "then<think>\n", "the end</think> then", "the end", " then"),
        (SPECIAL + "<think>the", " end</think> then", " end", " then"),
        (SPECIAL + "<think>", "the end", "the end", ""),
        (SPECIAL + "<think>a</think>", "the end", "", "the end"),
        ("say <think>" + SPECIAL + "then", "the end", "", "the end"),
        ("stop", "<think>a END</think> END. then", "a ", ""),
    ],
)
def test_reasoning_is_told_from_text(
    name: str, kind: str, prompt: str, completion: str, reasoning: str, text: str
) -> None:
    tokenizer = tokenizer_of(name, KINDS[kind])
    splitter = ReasoningSplitter(tokenizer)
    prompt_ids, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, completion))
    parts = splitter.split(prompt_ids, ids, ["END"])
    assert parts == (CompletionText(reasoning, text) if reasoning or "</think>" in completion else None)


def test_special_tokens_may_stay_in_both_parts() -> None:
    tokenizer = tokenizer_of("byte level", True)
    ids = tokenizer(f"<think>a{SPECIAL}</think>b{SPECIAL}", add_special_tokens=False)["input_ids"]
    assert ReasoningSplitter(tokenizer, skip_special_tokens=False).split([], ids, []) == (f"a{SPECIAL}", f"b{SPECIAL}")
    assert ReasoningSplitter(tokenizer).split([], ids, []) == ("a", "b")


def test_stop_string_that_names_a_special_token_ends_the_text() -> None:
    tokenizer = tokenizer_of("byte level", True)
    ids = tokenizer(f"<think>a</think>b{SPECIAL}\n", add_special_tokens=False)["input_ids"]
    assert ReasoningSplitter(tokenizer).split([], ids, [f"{SPECIAL}\n"]) == ("a", "b")


def test_spaces_are_kept_after_think_tokens() -> None:
    tokenizer = tokenizer_of("byte fallback", True)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "▁then", "</think>", "▁stop")]
    assert ReasoningSplitter(tokenizer).split([], ids, []) == (" then", " stop")


def test_model_without_think_tokens_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level()._tokenizer
    assert tokenizer is not None
    with caplog.at_level(logging.WARNING):
        assert find_think_tokens(tokenizer) == ("<think>", "</think>")
    assert "split_reasoning: neither the tokenizer nor its chat template has think tokens" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_think_tokens_that_the_text_leaves_out_are_warned_of(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_if_skipped(tokenizer_of("byte level", KINDS[kind]))
    assert ("<think> and </think> are special tokens" in caplog.text) == (kind == "special")
