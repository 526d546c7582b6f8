"""Batches of prompts are encoded as each prompt alone: texts, chats, token ids, and those that cannot be encoded."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rollout.errors import InputError, PromptError
from rollout.tokenization.prompt import Chat, EncodedPrompt, EncodingOptions, Prompt
from rollout.tokenization.prompt_encoder import PromptEncoder
from tests.support.chat_templates import CHATML, GEMMA, byte_tokenizer


def prompts(rng: random.Random, broken: bool) -> list[Prompt]:
    """Return prompts of all kinds in mixed order."""

    def text() -> str:
        words = ["hi", "<s>", "é", "\0", "<|im_end|>", " " * 9, "a\r\nb", "🎈", "</s>"]
        return "".join(rng.choices(words, k=rng.randrange(1, 9)))

    def messages() -> list[dict[str, Any]]:
        return [{"role": ("user", "assistant")[i % 2], "content": text()} for i in range(rng.randrange(1, 4))]

    kinds: list[Any] = [
        *(text() for _ in range(6)),
        *(messages() for _ in range(4)),
        *(Chat(messages(), chat_template_kwargs={"a": 1}) for _ in range(2)),
        *([rng.randrange(99) for _ in range(rng.randrange(9))] for _ in range(3)),
        "",
        [True, 3],
    ]
    odd = ["hi\ud800", [1, "a"], [2**64], [1, 2.5], [{"content": "x"}], [{"role": "user", "content": {}}], Chat([])]
    kinds += odd if broken else []
    rng.shuffle(kinds)
    return kinds


def alone(encoder: PromptEncoder, prompt: Prompt) -> object:
    try:
        return encoder.encode(prompt)
    except PromptError as error:
        return comparable(error)


def comparable(encoded: EncodedPrompt | PromptError) -> object:
    return (encoded.error_class, str(encoded)) if isinstance(encoded, PromptError) else encoded


@pytest.mark.parametrize("template", [CHATML, GEMMA])
@pytest.mark.parametrize("add", ["auto", True, False])
@pytest.mark.parametrize("broken", [False, True])
def test_batch_is_encoded_as_each_prompt_alone(template: str, add: Any, broken: bool) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    around = {"before": "<s>", "behind": "</s>"} if rng.random() < 0.7 else {}
    options = EncodingOptions(add_special_tokens=add)
    for _ in range(5):
        encoder = PromptEncoder(byte_tokenizer(template, **around), options)
        batch = prompts(rng, broken)
        found = [comparable(encoded) for encoded in encoder.encode_batch(batch)]
        assert found == [alone(encoder, prompt) for prompt in batch]
        assert any(isinstance(entry, EncodedPrompt) for entry in found)


def test_texts_go_to_the_tokenizer_together(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PromptEncoder(byte_tokenizer(before="<s>"))
    encoder.encode("a")
    calls: list[Any] = []
    called = PreTrainedTokenizerFast.__call__

    def record(self: Any, text: Any, **options: Any) -> Any:
        calls.append(text)
        return called(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", record)
    encoder.encode_batch(["a", [1], "b", "c"])
    assert calls == [["a", "b", "c"]]


def test_chat_without_a_template_is_refused_in_a_batch_too() -> None:
    with pytest.raises(InputError, match="no chat template"):
        PromptEncoder(byte_tokenizer()).encode_batch(["a", [{"role": "user", "content": "b"}]])


def test_empty_batch_needs_no_tokenizer() -> None:
    assert PromptEncoder(None).encode_batch([]) == []
