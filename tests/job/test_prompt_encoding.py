"""The trial of a job's first prompts, before the model is loaded, and the dates of a resumed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rollout.data.prompts import read_prompts
from rollout.errors import Exit, InputError
from rollout.job.job import run_job
from rollout.job.loading import Loaded
from rollout.job.prompt_encoding import Encoder, make_encoder, prompt_tokens
from rollout.tokenization.prompt_encoder import PromptEncoder
from tests.support.chat_templates import CHATML, GEMMA, LLAMA3, byte_tokenizer
from tests.support.jobs import FakeEngine, config_of, read_records

_HI = [{"role": "user", "content": "hi"}]
_SYSTEM = [{"role": "system", "content": "s"}, *_HI]


def encoder_of(folder: Path, template: str | None, prompts: list[Any], *overrides: str) -> Encoder:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    config = config_of(folder, f"data.path={path}", *overrides).data
    return make_encoder(config, byte_tokenizer(template), read_prompts(config), "m")


def test_template_that_refuses_every_chat_ends_the_job(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"System role not supported; unset data\.system_prompt$"):
        encoder_of(tmp_path, GEMMA, [_HI], "data.system_prompt=be brief")
    encoder_of(tmp_path, GEMMA, [_SYSTEM, _HI])


def test_options_that_cannot_be_used_name_their_key(tmp_path: Path) -> None:
    for override, message in (
        ("data.tools=none.json", r"^data\.tools=none\.json cannot be read"),
        ("data.chat_template=none.jinja", r"^data\.chat_template is 'none\.jinja'"),
        ("data.chat_template_kwargs={padding: 1}", r"^data\.chat_template_kwargs has padding"),
    ):
        with pytest.raises(InputError, match=message):
            encoder_of(tmp_path, CHATML, [_HI], override)


def test_settings_of_chats_are_refused_for_texts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.tools needs chat messages"):
        encoder_of(tmp_path, CHATML, ["hi"], "data.tools=tools.json")


def test_chats_without_a_template_are_refused_unless_one_is_given(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.path=m has no chat template"):
        encoder_of(tmp_path, None, [_HI])
    (tmp_path / "t.jinja").write_text(CHATML)
    encoder_of(tmp_path, None, [_HI], f"data.chat_template={tmp_path / 't.jinja'}")


def test_resumed_run_keeps_its_dates(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": _HI}) + "\n")
    config = config_of(tmp_path, f"data.path={tmp_path / 'rows.jsonl'}")
    tokenizer = byte_tokenizer(LLAMA3)

    def load_on(date: str, fail_after: int | None) -> Any:
        encoder = PromptEncoder(tokenizer, dates={"%d %b %Y": date})
        engine = FakeEngine(fail_after=fail_after)
        return lambda *_: Loaded(engine=engine, encoder=encoder, dtype="float32", attention="none", memory="cpu")

    with pytest.raises(RuntimeError):
        run_job(config, load_on("01 Jan 2026", 0))
    assert run_job(config, load_on("02 Jan 2026", None)) == Exit.COMPLETE
    (record,) = read_records(tmp_path / "out")
    assert "Today Date: 01 Jan 2026" in str(tokenizer.decode(record["prompt_ids"]))
    stored = json.loads((tmp_path / "out" / "run.json").read_text())
    assert stored["fingerprint"]["data.template_dates"] == {"%d %b %Y": "01 Jan 2026"}


def test_a_resume_that_renders_other_prompts_is_refused(tmp_path: Path) -> None:
    """As another version of transformers may, with the same files; the dates of the day do not count."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": _HI}) + "\n")
    config = config_of(tmp_path, f"data.path={tmp_path / 'rows.jsonl'}")

    def load_with(template: str, date: str, fail_after: int | None) -> Any:
        encoder = PromptEncoder(byte_tokenizer(template), dates={"%d %b %Y": date})
        engine = FakeEngine(fail_after=fail_after)
        return lambda *_: Loaded(engine=engine, encoder=encoder, dtype="float32", attention="none", memory="cpu")

    with pytest.raises(RuntimeError):
        run_job(config, load_with(LLAMA3, "01 Jan 2026", 0))
    with pytest.raises(InputError, match=r"another fingerprint \(data\.prompt_tokens was "):
        run_job(config, load_with(LLAMA3 + " ", "01 Jan 2026", None))
    assert run_job(config, load_with(LLAMA3, "02 Jan 2026", None)) == Exit.COMPLETE


def test_the_digest_of_tokens_covers_rows_of_all_parts_and_no_dates(tmp_path: Path) -> None:
    def digest(texts: list[str], date: str = "01 Jan 2026") -> str:
        rows = "".join(json.dumps({"prompt": [{"role": "user", "content": text}]}) + "\n" for text in texts)
        (tmp_path / "rows.jsonl").write_text(rows)
        prompts = read_prompts(config_of(tmp_path, f"data.path={tmp_path / 'rows.jsonl'}").data)
        return prompt_tokens(PromptEncoder(byte_tokenizer(LLAMA3), dates={"%d %b %Y": date}), prompts)

    texts = [f"text {number}" for number in range(200)]
    assert digest(texts) == digest(texts, "02 Jan 2026")
    assert digest(texts) != digest([*texts[:198], "other", texts[199]])
    assert digest(["a"]) != digest(["b"])
