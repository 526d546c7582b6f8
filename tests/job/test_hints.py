"""What a job says at its start."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout.config.compose import load_config
from rollout.data.prompts import read_prompts
from rollout.job.hints import hint_at_chat

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
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    config = load_config([f"data.path={path}", "output.dir=out", *overrides]).data
    tokenizer: Any = SimpleNamespace(chat_template=template, all_special_tokens=["<|im_start|>", "<|im_end|>"])
    with caplog.at_level(logging.INFO, "rollout.job.hints"):
        hint_at_chat(tokenizer, read_prompts(config), config)
    assert ("data.as_chat=true" in caplog.text) == hinted
