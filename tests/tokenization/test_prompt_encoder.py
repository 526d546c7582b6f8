"""Prompts as token ids: templates of well-known families, special tokens, and errors of one prompt."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rollout.errors import InputError, PromptError
from rollout.tokenization.prompt import Chat, EncodingOptions, Prompt
from rollout.tokenization.prompt_encoder import PromptEncoder
from tests.support import chat_templates
from tests.support.chat_templates import CHATML, GEMMA, HARMONY, IDS, LLAMA3, PARTS_ALONE, QWEN3, byte_tokenizer

TOKENS = {i: token for token, i in IDS.items()}


def chat(*contents: Any) -> list[dict[str, Any]]:
    """Return messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def rendered(template: str | None, prompt: Prompt, **options: Any) -> str:
    tokenizer = byte_tokenizer(template)
    return str(tokenizer.decode(PromptEncoder(tokenizer, EncodingOptions(**options)).encode(prompt).token_ids))


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("CHATML", "<|im_end|>"),
        ("LLAMA3", "<|eot|>"),
        ("GEMMA", "<end_of_turn>"),
        ("MISTRAL", "</s>"),
        ("PHI3", "<|end|>"),
        ("GLM4", "<|user|>"),
        ("HARMONY", "<|return|>"),
        ("QWEN3", "<|im_end|>"),
        ("PARTS_ALONE", "<|im_end|>"),
    ],
)
def test_turn_end_of_a_family_is_found(name: str, end: str) -> None:
    encoder = PromptEncoder(byte_tokenizer(getattr(chat_templates, name)))
    ends = encoder.encode(chat("hi")).turn_end_ids
    assert [TOKENS[i] for i in ends] == list(dict.fromkeys([end, "</s>"]))


@pytest.mark.parametrize("name", ["CHATML", "LLAMA3", "GEMMA", "MISTRAL", "PHI3", "GLM4", "HARMONY", "PARTS_ALONE"])
def test_last_assistant_message_is_left_open(name: str) -> None:
    template = getattr(chat_templates, name)
    text = rendered(template, chat("Capital?", "It is"))
    assert text.endswith("It is")
    assert rendered(template, chat("Capital?", "It is", "Sure?")).startswith(text)


def test_assistant_message_that_the_template_drops_is_refused() -> None:
    with pytest.raises(PromptError, match="cannot leave open"):
        rendered(QWEN3, chat("hi", "<think>no</think>Yes"))


def test_chat_is_what_transformers_renders() -> None:
    tokenizer = byte_tokenizer(HARMONY)
    messages = chat("a", "b", "c")
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert PromptEncoder(tokenizer).encode(messages).token_ids == expected["input_ids"]  # type: ignore[index, call-overload]


def test_tools_and_template_arguments_of_a_chat_win_over_those_of_the_engine() -> None:
    options: dict[str, Any] = {"tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": False}}
    assert '[{"name": "f"}]' in rendered(QWEN3, chat("hi"), **options)
    assert rendered(QWEN3, chat("hi"), **options).endswith("</think>\n\n")
    own = rendered(QWEN3, Chat(chat("hi"), tools=[], chat_template_kwargs={"enable_thinking": True}), **options)
    assert own.endswith("hi<|im_end|>\n<|im_start|>assistant\n")


def test_what_the_template_does_not_use_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    options = EncodingOptions(tools=[{"name": "f"}], chat_template_kwargs={"enable_thinkin": False})
    encoder = PromptEncoder(byte_tokenizer(CHATML), options)
    for _ in range(2):
        encoder.encode(chat("hi"))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "chat_template_kwargs.enable_thinkin" in warnings[0]
    assert "tools" in warnings[1]


def test_reserved_template_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="chat_template_kwargs has tokenize"):
        PromptEncoder(byte_tokenizer(CHATML), EncodingOptions(chat_template_kwargs={"tokenize": False}))


@pytest.mark.parametrize("template", [CHATML, PARTS_ALONE])
def test_content_takes_the_form_that_the_template_reads(template: str) -> None:
    parts = [{"type": "text", "text": "a "}, "b"]
    assert rendered(template, chat(parts)) == rendered(template, chat("a b"))
    assert "a b<|im_end|>" in rendered(template, chat("a b"))


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([{"role": "system", "content": "s"}, *chat("hi")], "System role not supported"),
        (chat("a", "b") + chat("c", "d")[1:] + chat("e"), "must alternate"),
        ([{"role": "user", "text": "hi"}], "has no content"),
        ([{"role": "user", "content": {"a": 1}}], "type dict"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "text alone"),
        ([{"content": "hi"}], "must have a role"),
    ],
)
def test_bad_chat_is_an_error_of_its_prompt(messages: Any, error: str) -> None:
    with pytest.raises(PromptError, match=error) as raised:
        rendered(GEMMA, messages)
    assert raised.value.error_class == "bad_prompt"


def test_text_that_begins_with_bos_gets_no_second() -> None:
    tokenizer = byte_tokenizer(before="<s>", behind="</s>")
    encoder = PromptEncoder(tokenizer)
    text = tokenizer("hi", add_special_tokens=False)["input_ids"]
    bos, eos = IDS["<s>"], IDS["</s>"]
    assert encoder.encode("hi").token_ids == [bos, *text] == encoder.encode("<s>hi").token_ids
    assert PromptEncoder(tokenizer, EncodingOptions(add_special_tokens=False)).encode("hi").token_ids == text
    always = PromptEncoder(tokenizer, EncodingOptions(add_special_tokens=True))
    assert always.encode("<s>hi").token_ids == [bos, bos, *text, eos]


def test_text_with_the_template_applied_ends_like_a_chat() -> None:
    encoder = PromptEncoder(byte_tokenizer(CHATML))
    assert encoder.encode(rendered(CHATML, chat("hi"))) == encoder.encode(chat("hi"))
    assert encoder.encode("user\nhi\n").turn_end_ids == ()


def test_lone_surrogate_is_an_error_of_its_prompt() -> None:
    with pytest.raises(PromptError, match="character 2 is half of a surrogate pair"):
        PromptEncoder(byte_tokenizer()).encode("hi\ud800")


def test_pinned_dates_are_written_instead_of_today() -> None:
    encoder = PromptEncoder(byte_tokenizer(LLAMA3))
    assert list(encoder.dates) == ["%d %b %Y"]
    tokenizer = byte_tokenizer()
    now = tokenizer.decode(encoder.encode(chat("hi")).token_ids)
    then = tokenizer.decode(encoder.dated({"%d %b %Y": "01 Jan 1970"}).encode(chat("hi")).token_ids)
    assert then == now.replace(encoder.dates["%d %b %Y"], "01 Jan 1970") != now


@pytest.mark.parametrize("call", ["'%Y'", "format='%Y'"])
def test_dates_are_pinned_however_the_clock_is_called(call: str) -> None:
    encoder = PromptEncoder(byte_tokenizer("{{ strftime_now(" + call + ") }}{{ messages[0]['content'] }}"))
    assert list(encoder.dates) == ["%Y"]
    ids = encoder.dated({"%Y": "1970"}).encode(chat("hi")).token_ids
    assert byte_tokenizer().decode(ids) == "1970hi"


def test_template_is_a_text_a_file_or_a_name(tmp_path: Any) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("file {{ messages[0]['content'] }}")
    assert rendered(CHATML, chat("hi"), chat_template=str(file)) == "file hi"
    assert rendered(CHATML, chat("hi"), chat_template="text {{ messages[0]['content'] }}") == "text hi"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "short": "short {{ messages[0]['content'] }}"}
    named = PromptEncoder(tokenizer, EncodingOptions(chat_template="short"))
    assert tokenizer.decode(named.encode(chat("hi")).token_ids) == "short hi"
    for wrong, message in (("shrt", "cannot be read"), ("{{ messages ", "syntax error in line 1")):
        with pytest.raises(InputError, match=f"^chat_template .*{message}"):
            PromptEncoder(tokenizer, EncodingOptions(chat_template=wrong))


def test_prompts_without_a_tokenizer_are_ids() -> None:
    assert PromptEncoder(None).encode([1, 2]).token_ids == [1, 2]
    with pytest.raises(InputError, match="no tokenizer for texts"):
        PromptEncoder(None).encode("hi")


_CALLS = (
    "{% for m in messages %}{{ m['content'] or '' }}{% for call in m.tool_calls or [] %}<call>CALL</call>{% endfor %}"
    "{% endfor %}"
)
_WRITTEN = {
    "as JSON": ("{{ call.function.arguments | tojson }}", '{"x": 1}'),
    "by name": ("{% for k, v in call.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "x=1"),
    "as it is": ("{{ call.function.arguments }}", '{"x": 1}'),
    "joined": ("{{ 'f ' + call.function.arguments }}", 'f {"x": 1}'),
    "either": (
        "{% set a = call.function.arguments %}{{ a if a is string else a | tojson }}",
        '{"x": 1}',
    ),
}


def call_of(arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": arguments}}
    return [*chat("hi"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "3"}]


@pytest.mark.parametrize("arguments", ['{"x": 1}', {"x": 1}], ids=["text", "object"])
@pytest.mark.parametrize("form", _WRITTEN)
def test_arguments_of_tool_calls_have_the_form_that_the_template_takes(form: str, arguments: Any) -> None:
    source, written = _WRITTEN[form]
    assert f"<call>{written}</call>" in rendered(_CALLS.replace("CALL", source), call_of(arguments))


@pytest.mark.parametrize("arguments", ['{"x": ', "[1]"])
def test_arguments_that_are_no_json_object_are_refused(arguments: str) -> None:
    template = _CALLS.replace("CALL", _WRITTEN["by name"][0])
    with pytest.raises(PromptError, match=r"Message 1 of the chat has a tool call .* no JSON object"):
        rendered(template, call_of(arguments))
