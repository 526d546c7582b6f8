"""What ends completions beside the model's end-of-sequence ids: turns of chats, and special tokens as stop strings."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rollout import Engine, SamplingParams
from tests.engine.test_engine import tokenizer_of
from tests.support.tiny_models import tiny

_TURN_END = 9
_CHAT = [{"role": "user", "content": "w5"}]


def engine_of() -> Engine:
    tokenizer = tokenizer_of("{% for m in messages %}w7 {{ m['content'] }} w9 {% endfor %}w8")
    tokenizer.add_special_tokens({"extra_special_tokens": ["w7", "w9"]})
    return Engine(tiny("llama"), tokenizer)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_of()


def ends(engine: Engine, prompt: Any, **params: Any) -> str:
    """Return the finish reason of a completion that says nothing but the end of the turn."""
    (record,) = engine.generate([prompt], SamplingParams(max_new_tokens=3, allowed_token_ids=(_TURN_END,), **params))
    return record.finish_reason


def test_chat_ends_with_the_turn_and_plain_text_does_not(engine: Engine) -> None:
    assert ends(engine, _CHAT) == ends(engine, "w7 w5 w9 w8") == "stop"
    assert ends(engine, "w5 w8") == ends(engine, [7, 5, 9, 8]) == "length"


def test_parameters_turn_the_end_of_the_turn_off(engine: Engine) -> None:
    assert ends(engine, _CHAT, stop_at_turn_end=False) == ends(engine, _CHAT, ignore_eos=True) == "length"


def test_no_end_counts_before_min_new_tokens(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=6, min_new_tokens=3, logit_bias={_TURN_END: 50.0})
    assert len(engine.generate([_CHAT], params)[0].completion_ids) == 4


def test_special_token_as_a_stop_string_is_found_by_id(engine: Engine) -> None:
    assert ends(engine, "w5 w8", stop=("w9",)) == "stop"
    assert ends(engine, "w5 w8", stop=("w9",), ignore_eos=True) == "stop"


def test_stop_string_of_special_tokens_and_other_text_is_found(engine: Engine) -> None:
    assert ends(engine, "w5 w8", stop=("w9 w9",)) == "stop"
    assert ends(engine, "w5 w8", stop=("w9 w1",)) == "length"


def test_end_of_the_tokenizer_alone_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        engine_of().generate(["w5 w6"] * 2, SamplingParams(max_new_tokens=1))
        assert "tokenizer's end of sequence" not in caplog.text
        other = tokenizer_of()
        other.eos_token = "w11"
        Engine(tiny("llama"), other).generate(["w5 w6"] * 2, SamplingParams(max_new_tokens=1))
    assert caplog.text.count("also end at the tokenizer's end of sequence, w11 (id 11)") == 1


def test_end_of_turn_is_said_once_per_engine(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        engine_of().generate([_CHAT, _CHAT], SamplingParams(max_new_tokens=1))
    assert caplog.text.count("Chat completions also end at") == 1
    assert "id 9" in caplog.text
