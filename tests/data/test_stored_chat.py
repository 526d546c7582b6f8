"""Chat messages that a dataset stores as text, and the columns for the chat template."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rollout.config.compose import load_config
from rollout.data.dataset_row import DatasetRow, dataset_row
from rollout.tokenization.prompt import Chat
from rollout.tokenization.stored_chat import stored_messages

_HI = [{"role": "user", "content": "it's"}]


@pytest.mark.parametrize("text", [json.dumps(_HI), json.dumps(_HI, indent=2), str(_HI), json.dumps(_HI[0])])
def test_messages_are_read_from_text(text: str) -> None:
    assert stored_messages(text) == _HI


@pytest.mark.parametrize("text", ["plain", "[1, 2]", '[{"a": 1}]', "{x}", "[{ not JSON", '{"a": {"role": "b"}}'])
def test_other_texts_are_texts(text: str) -> None:
    assert stored_messages(text) is None


@pytest.mark.parametrize("text", ['[{"role": "user", "con', '[{"role": "user"}, 5]', '[{"content": "hi"}]'])
def test_broken_messages_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        stored_messages(text)


def row_of(**columns: Any) -> DatasetRow:
    return dataset_row(0, "r", columns, load_config(["output.dir=out"]).data)


def test_columns_for_the_template_reach_the_prompt() -> None:
    tools = [{"name": "f", "parameters": {"a": 1, "b": None}}]
    row = row_of(prompt=_HI, tools=tools, chat_template_kwargs='{"x": false}')
    assert row.prompt == Chat(_HI, [{"name": "f", "parameters": {"a": 1}}], {"x": False})
    assert row_of(prompt=_HI, tools=json.dumps(tools)).prompt == Chat(_HI, tools)
    assert row_of(prompt=_HI, tools=None).prompt == _HI
    assert row_of(prompt="text", tools=tools).prompt == "text"


@pytest.mark.parametrize("columns", [{"tools": "hammer"}, {"tools": [1]}, {"chat_template_kwargs": "[]"}])
def test_bad_column_for_the_template_is_an_error_of_its_row(columns: dict[str, Any]) -> None:
    row = row_of(prompt=_HI, **columns)
    assert row.error_class == "bad_prompt"
    assert next(iter(columns)) in row.error


_SHAREGPT = [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]


@pytest.mark.parametrize("prompt", [_SHAREGPT, json.dumps(_SHAREGPT), [dict(m, role=None) for m in _SHAREGPT]])
def test_chats_in_sharegpt_form_are_read_as_messages(prompt: Any) -> None:
    roles = zip(("system", "user", "assistant"), ("s", "hi", "yes"), strict=True)
    assert row_of(prompt=prompt).prompt == [{"role": role, "content": content} for role, content in roles]


def test_unknown_sender_is_an_error_of_its_row() -> None:
    row = row_of(prompt=[{"from": "narrator", "value": "hi"}])
    assert row.error_class == "bad_prompt"
    assert "narrator" in row.error


def test_system_message_of_a_chat_is_kept_and_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    chat = [{"role": "system", "content": "own"}, *_HI]
    config = load_config(["output.dir=out", "data.path=own_system", "data.system_prompt=other"]).data
    assert dataset_row(0, "r", {"prompt": chat}, config).prompt == chat
    assert "data.system_prompt is not used where a chat of own_system" in caplog.text
