"""What the model and the tokenizer say of token ids, read for every call: end-of-sequence ids and sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rollout import Engine, SamplingParams
from rollout.errors import InputError
from tests.engine.test_engine import tokenizer_of
from tests.support.parity import random_prompts, worst_logprob
from tests.support.tiny_models import VOCABULARY, tiny

_PROMPTS = random_prompts(4, 4)


def reason(engine: Engine, token: int, prompt: Any = (5, 6, 8)) -> str:
    """Return how a completion ends that says nothing but ``token``."""
    params = SamplingParams(max_new_tokens=3, allowed_token_ids=(token,))
    return engine.generate([prompt if isinstance(prompt, str) else list(prompt)], params)[0].finish_reason


def test_ids_of_the_model_and_of_the_tokenizer_end_completions() -> None:
    model, tokenizer = tiny("llama"), tokenizer_of()
    model.generation_config.eos_token_id = [40, 41]  # type: ignore[union-attr]
    tokenizer.eos_token = "w50"
    engine = Engine(model, tokenizer)
    assert [reason(engine, token) for token in (40, 41, 50, 2)] == ["stop", "stop", "stop", "length"]


def test_end_ids_that_change_between_calls_are_followed() -> None:
    model, tokenizer = tiny("llama"), tokenizer_of()
    engine = Engine(model, tokenizer)
    assert [reason(engine, token) for token in (2, 60, 61)] == ["stop", "length", "length"]
    model.generation_config.eos_token_id = 60  # type: ignore[union-attr]
    tokenizer.eos_token = "w61"
    assert [reason(engine, token) for token in (2, 60, 61)] == ["length", "stop", "stop"]
    params = SamplingParams(max_new_tokens=5, min_new_tokens=3, logit_bias={60: 60.0, 2: 50.0})
    assert engine.generate([[5, 6]], params)[0].completion_ids == [2, 2, 2, 60]


def test_tokenizers_end_that_changes_ends_chats() -> None:
    model, tokenizer = tiny("llama"), tokenizer_of()
    engine = Engine(model, tokenizer)
    chat = [{"role": "user", "content": "w5"}]
    params = SamplingParams(max_new_tokens=3, allowed_token_ids=(61,))
    assert engine.generate([chat], params)[0].finish_reason == "length"
    tokenizer.eos_token = "w61"
    assert engine.generate([chat], params)[0].finish_reason == "stop"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [300, 120])
def test_resized_embeddings_are_served_on_the_next_call(tied: bool, size: int) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    engine = Engine(model, None)
    engine.generate(_PROMPTS, SamplingParams(max_new_tokens=2))
    model.resize_token_embeddings(size, mean_resizing=False)
    last = size - 1
    params = SamplingParams(n=2, max_new_tokens=6, ignore_eos=True)
    batch = engine.generate([[3, last, 5], [last] * 20], params)
    assert [record.error_class for record in batch] == [""] * 4
    assert worst_logprob(model, list(batch)) < 1e-5
    only_last = engine.generate([[3, 4]], SamplingParams(max_new_tokens=2, allowed_token_ids=(last,)))
    assert only_last[0].completion_ids == [last, last]
    assert engine.generate([[3, size]])[0].error_class == "bad_prompt"
    with pytest.raises(InputError, match=f"the last one is {last}"):
        engine.generate([[3, 4]], SamplingParams(logit_bias={size: 1.0}))


def test_tokenizer_with_more_tokens_than_the_model_embeds_is_refused() -> None:
    with pytest.raises(InputError, match=f"tokenizer has {VOCABULARY} tokens, but the model embeds 150 token ids"):
        Engine(tiny("llama", vocab_size=150), tokenizer_of())


def test_tokenizer_with_its_padding_outside_of_the_embeddings_is_refused_until_they_are_resized() -> None:
    model, tokenizer = tiny("llama"), tokenizer_of()
    engine = Engine(model, tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(InputError, match=f"pad_token_id {VOCABULARY}, but the model embeds {VOCABULARY} token ids"):
        engine.generate(["w5"], SamplingParams(max_new_tokens=1))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    assert engine.generate(["w5 <pad>"], SamplingParams(max_new_tokens=1))[0].prompt_ids == [5, VOCABULARY]


def test_added_tokens_that_the_model_cannot_embed_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_of()
    tokenizer.add_tokens(["<image>"])
    engine = Engine(tiny("llama"), tokenizer)
    batch = engine.generate(["w5 w6", "w5 <image>"], SamplingParams(max_new_tokens=1))
    assert [record.error_class for record in batch] == ["", "bad_prompt"]
    assert caplog.text.count(f"{VOCABULARY + 1} tokens and the model embeds {VOCABULARY}") == 1


def test_smaller_tokenizer_is_served() -> None:
    model: PreTrainedModel = tiny("llama", vocab_size=VOCABULARY + 57)
    assert torch.isfinite(torch.tensor(Engine(model, tokenizer_of()).generate(["w5"])[0].logprobs)).all()
