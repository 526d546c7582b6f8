"""What a job says at its start."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout.config.compose import load_config
from rollout.data.prompts import read_prompts
from rollout.job.hints import hint_at_length, hint_at_prompts

CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("prompts", "template", "overrides", "hinted"),
    [
        (["What is a prime?", "Name one."], "{{ messages }}", [], True),
        (["What is a prime?"], "{{ messages }}", ["data.as_chat=true"], False),
        (["What is a prime?"], None, [], False),
        (["<|im_start|>user\nhi<|im_end|>\n"], "{{ messages }}", [], False),
        ([CHAT], "{{ messages }}", [], False),
        ([[1, 2, 3]], "{{ messages }}", [], False),
        (["", "text"], "{{ messages }}", [], True),
    ],
)
def test_only_plain_text_for_a_chat_model_is_hinted_at(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    prompts: list[Any],
    template: str | None,
    overrides: list[str],
    hinted: bool,
) -> None:
    said = hints(tmp_path, caplog, prompts, template, overrides)
    assert ("data.as_chat=true" in said) == hinted


def hints(
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    prompts: list[Any],
    template: str | None = "{{ messages }}",
    overrides: Sequence[str] = (),
) -> str:
    """Return what is said about the prompts of a file."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    config = load_config([f"data.path={path}", "output.dir=out", *overrides]).data
    tokenizer: Any = SimpleNamespace(chat_template=template, all_special_tokens=["<|im_start|>", "<|im_end|>"])
    with caplog.at_level(logging.INFO, "rollout.job.hints"):
        hint_at_prompts(tokenizer, read_prompts(config), config)
    return caplog.text


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([[*CHAT, {"role": "assistant", "content": "yes"}], CHAT], "1 of the first 2 chats end with an assistant's"),
        (["[1, 22, 3]", "[4]"], "store them as lists of numbers"),
    ],
)
def test_prompts_that_may_be_meant_otherwise_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prompts: list[Any], said: str
) -> None:
    assert said in hints(tmp_path, caplog, prompts)


@pytest.mark.parametrize("prompts", [[CHAT, CHAT], ["[1]", "text"], [[1, 2]]])
def test_other_prompts_are_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture, prompts: list[Any]) -> None:
    hints(tmp_path, caplog, prompts)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.parametrize(("asked", "limit", "hinted"), [(255, 256, False), (256, 256, True), (9999, None, False)])
def test_length_beyond_the_context_is_hinted_at(
    caplog: pytest.LogCaptureFixture, asked: int, limit: int | None, hinted: bool
) -> None:
    hint_at_length(asked, limit)
    assert ("finish_reason length" in caplog.text) is hinted
